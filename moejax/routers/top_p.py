"""Dynamic top-p routing: as many experts as it takes for their probabilities to exceed p.

Huang et al. 2024, "Harder tasks need more experts: dynamic routing in MoE models".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.rows import token_rows
from moejax.routers.scorers import LinearScorer
from moejax.routers.weighting import normalised


@dataclasses.dataclass(frozen=True)
class TopPAssign:
  """Experts by falling probability, while the sum of those before is at most p.

  Attributes:
    p: in training.
    eval_p: outside of it.
    max_k: rows of a token.
    renorm: divide the weights of the kept by their sum.
  """

  p: float
  eval_p: float
  max_k: int
  renorm: bool = False

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    gate_bsk, expert_bsk = jax.lax.top_k(scores.gate, self.max_k)
    before_bsk = jnp.cumsum(gate_bsk, -1) - gate_bsk
    limit = jnp.asarray(self.p if context.train else self.eval_p, gate_bsk.dtype)
    kept_bsk = before_bsk <= limit  # the one that crosses p is kept
    weight_bsk = jnp.where(kept_bsk, gate_bsk, 0)
    if self.renorm:
      weight_bsk = normalised(weight_bsk)
    return token_rows(expert_bsk, weight_bsk, kept_bsk, scores.gate.shape[-1], context)


def top_p(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  p: float = 0.4,
  eval_p: float | None = None,
  max_k: int | None = None,
  renorm: bool = False,
  noise_std: float = 0.0,
  jitter: float = 0.0,
  init_std: float | None = None,
) -> Router:
  """Top-p token choice: `P = softmax(x W)`, the smallest set of largest probabilities whose sum exceeds p.

  The weights are the probabilities as they are (released code). The paper trains with the losses `entropy` (1e-4),
  without which all logits equal costs floor(p E) + 1 experts a token, and `balance` (1e-2).

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    p: 0 keeps one expert, 1 and more all; 0.4 in the paper, of 16 experts.
    eval_p: p outside of training; default `p`.
    max_k: at most so many experts a token (default all), which bounds rows and memory.
    renorm: divide the weights of the kept by their sum (HMoE, Wang et al. 2024).
    noise_std, jitter, init_std: see `LinearScorer`.

  Raises:
    ValueError: p below 0, max_k out of its range.
  """
  for key, value in (('p', p), ('eval_p', eval_p)):
    if value is not None and not value >= 0:
      raise ValueError(f'{key}={value}: accepted are numbers from 0')
  max_k = num_experts if max_k is None else max_k
  if not 1 <= max_k <= num_experts:
    raise ValueError(
      f'max_k={max_k} with num_experts={num_experts}: accepted are 1 to {num_experts}'
    )
  if renorm and max_k == 1:
    raise ValueError(
      "renorm=True with max_k=1 makes every weight 1 and the router's gradient zero: accepted is max_k >= 2"
    )
  return Router(
    LinearScorer(
      d_model, num_experts, noise_std=noise_std, jitter=jitter, init_std=init_std, rngs=rngs
    ),
    TokenAffinity('softmax', num_experts),
    TopPAssign(p, p if eval_p is None else eval_p, max_k, renorm),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=float(max_k),
  )
