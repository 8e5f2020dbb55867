"""Dense training, sparse inference: every expert in training, some in evaluation.

Pan et al. 2024, "Dense training, sparse inference: rethinking training of mixture-of-experts language models".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.dense import assign_all
from moejax.routers.router import Flags, Router
from moejax.routers.rows import token_rows
from moejax.routers.scorers import LinearScorer


@dataclasses.dataclass(frozen=True)
class DenseThenSparse:
  """All experts in training; outside of it the `k` most probable that are above `threshold`."""

  k: int
  threshold: float

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    if context.train:
      return assign_all(scores, context)
    gate_bsk, expert_bsk = jax.lax.top_k(scores.gate, self.k)
    kept_bsk = gate_bsk > jnp.asarray(self.threshold, gate_bsk.dtype)
    return token_rows(expert_bsk, gate_bsk, kept_bsk, scores.gate.shape[-1], context)


def ds_moe(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  eval_k: int | None = None,
  eval_threshold: float = 0.0,
  init_std: float | None = None,
) -> Router:
  """`y = sum_e P_e F_e(x)` with `P = softmax(x W)` over all experts in training, over some in evaluation.

  Weights are the probabilities as they are in both. The paper adds the loss `mutual_information` (6.3e-4, 4e-4 and
  2e-4 at 1, 3 and 6 billion parameters), without which dropping experts in evaluation costs quality.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    eval_k: experts of a token in evaluation, default all.
    eval_threshold: in evaluation, only experts of larger probability. A token may have none.
    init_std: see `LinearScorer`.

  Raises:
    ValueError: eval_k or eval_threshold out of its range.
  """
  eval_k = num_experts if eval_k is None else eval_k
  if not 1 <= eval_k <= num_experts:
    raise ValueError(
      f'eval_k={eval_k} with num_experts={num_experts}: accepted are 1 to {num_experts}'
    )
  if not 0 <= eval_threshold < 1:
    raise ValueError(f'eval_threshold={eval_threshold}: accepted are numbers from 0 to below 1')
  return Router(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    TokenAffinity('softmax', num_experts),
    DenseThenSparse(eval_k, eval_threshold),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=float(num_experts),
  )
