"""AdaMoE: null experts among the choices, so that tokens take different numbers of true experts.

Zeng et al. 2024, "AdaMoE: token-adaptive routing with null experts for mixture-of-experts language models".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.rows import token_rows
from moejax.routers.scorers import LinearScorer, check_from_one
from moejax.routers.weighting import normalised


@dataclasses.dataclass(frozen=True)
class NullAffinity:
  """`TokenAffinity` over the true and the null experts, which come last."""

  k: int
  nulls: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity('softmax', self.k)(logits_bse, std, bias_e, context)
    return dataclasses.replace(scores, nulls=self.nulls)


@dataclasses.dataclass(frozen=True)
class NullAssign:
  """The k most probable; weights of the true ones among them sum to one, of the null ones are zero."""

  k: int

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    num_all = scores.select.shape[-1]
    _, expert_bsk = jax.lax.top_k(scores.select, self.k)
    true_bsk = expert_bsk < num_all - scores.nulls
    gate_bsk = jnp.where(true_bsk, jnp.take_along_axis(scores.gate, expert_bsk, -1), 0)
    # of null experts alone, and where those of the true ones are no numbers beside theirs: 0, not 0 / 0
    weight_bsk = normalised(gate_bsk)
    return token_rows(expert_bsk, weight_bsk, jnp.ones_like(true_bsk), num_all, context)


def ada_moe(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 4,
  nulls: int | None = None,
  noise_std: float = 0.0,
  jitter: float = 0.0,
  init_std: float | None = None,
) -> Router:
  """Top-k of E true and m null experts, weights normalised over the true ones chosen.

  A null expert costs nothing and gives zero; it is a column of the router and no more. In a balanced router a token
  has `k E / (E + m)` true experts on average. Statistics, losses and the `load` metric count E + m experts, the null
  ones last, and every null expert counts the mean of all of them: that makes `balance` the paper's loss, `(E + m)
  sum_e f~_e P_e`, which moves how much the null experts take and not which of them (one of the two released
  experiments averages along the wrong axis, to no effect). The paper lowers its coefficient from 0.02 to 1e-4.

  Args:
    d_model: D.
    num_experts: E, true experts: those of the layer.
    rngs: source of the initial router kernel.
    k: choices of a token, null ones included.
    nulls: m; default E. The paper has 4 true experts with (m, k) of (5, 2) to (9, 4).
    noise_std, jitter, init_std: see `LinearScorer`.

  Raises:
    ValueError: k or nulls out of its range.
  """
  nulls = num_experts if nulls is None else nulls
  check_from_one(nulls=nulls)
  if not 2 <= k <= num_experts + nulls:
    raise ValueError(
      f'k={k} with num_experts={num_experts} and nulls={nulls}: accepted are 2 to {num_experts + nulls}'
    )
  return Router(
    LinearScorer(
      d_model, num_experts + nulls, noise_std=noise_std, jitter=jitter, init_std=init_std, rngs=rngs
    ),
    NullAffinity(k, nulls),
    NullAssign(k),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=k * num_experts / (num_experts + nulls),
  )
