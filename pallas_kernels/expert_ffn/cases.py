"""Routings that every body of `expert_ffn` must get right.

The cases of one shape share one compiled program. Rows of dropped choices have `expert == E`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
  """A routing `expert [R]` of R = T * K token-major rows among `num_experts`."""

  name: str
  num_tokens: int
  num_choices: int
  num_experts: int
  expert: np.ndarray

  def arrays(self, dtype, d_model: int = 8, d_ff: int = 12) -> dict[str, np.ndarray]:
    """Inputs by name; weights of dropped rows are not zero."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape, scale=shape[-2] ** -0.5).astype(dtype)
    num_rows, experts = self.num_tokens * self.num_choices, self.num_experts
    return {
      'x': rng.normal(size=(self.num_tokens, d_model)).astype(dtype),
      'token': np.arange(num_rows, dtype=np.int32) // max(self.num_choices, 1),
      'expert': self.expert.astype(np.int32),
      'weight': rng.uniform(0.1, 1, num_rows).astype(dtype),
      'w_gate': draw(experts, d_model, d_ff),
      'w_up': draw(experts, d_model, d_ff),
      'w_down': draw(experts, d_ff, d_model),
    }


def _sizes(*sizes: int) -> np.ndarray:
  """A shuffled routing with `sizes[e]` rows for expert e; the last size is of dropped rows."""
  return np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))


# 512 rows among 4 experts: on the CPU a batch of 160 rows of each where loads are even enough, then blocks of 128 and
# 32 rows; blocks of 64 elsewhere.
CASES = (
  Case('balanced', 256, 2, 4, np.arange(512) % 4),
  Case('uneven, some dropped', 256, 2, 4, _sizes(200, 3, 150, 59, 100)),
  Case('a little uneven', 256, 2, 4, _sizes(90, 200, 100, 100, 22)),
  Case('empty experts at both ends', 256, 2, 4, _sizes(0, 300, 212, 0, 0)),
  Case('one hot expert', 256, 2, 4, _sizes(0, 0, 512, 0, 0)),
  Case('around the block width', 256, 2, 4, _sizes(1, 127, 128, 129, 127)),
  Case('all dropped', 256, 2, 4, _sizes(0, 0, 0, 0, 512)),
  Case('one choice', 96, 1, 4, _sizes(20, 0, 41, 15, 20)),
  Case('one expert', 64, 1, 1, _sizes(50, 14)),
  Case('fewer rows than experts', 4, 1, 8, np.array([7, 0, 7, 3])),
  Case('no rows', 4, 0, 2, np.zeros(0)),
)
