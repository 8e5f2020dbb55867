"""Group-limited routing: a token's experts come from few groups, so from few devices (DeepSeek-V3, 2024)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Router
from moejax.routers.scorers import LinearScorer, check_from_one
from moejax.routers.top_k import token_choice


@dataclasses.dataclass(frozen=True)
class GroupLimitedAffinity:
  """`TokenAffinity` with a selection score of -inf outside of the best groups.

  Attributes:
    function, k: see `TokenAffinity`.
    groups, limit, best: see `group_limited`.
  """

  function: str
  k: int
  groups: int
  limit: int
  best: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    score_bse = scores.gate if bias_e is None else scores.select
    score_bsge = jax.lax.stop_gradient(score_bse).reshape(*score_bse.shape[:2], self.groups, -1)
    score_bsg = jax.lax.top_k(score_bsge, self.best)[0].sum(-1)
    _, kept = jax.lax.top_k(score_bsg, self.limit)
    kept_bsg = jax.nn.one_hot(kept, self.groups, dtype=jnp.bool_).any(-2)
    kept_bse = jnp.repeat(kept_bsg, score_bsge.shape[-1], -1)
    select_bse = jnp.where(kept_bse, scores.select, -jnp.inf)
    return dataclasses.replace(scores, select=select_bse, clusters=self.groups)


def group_limited(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  groups: int = 4,
  limit: int = 2,
  best: int = 2,
  weighting: str = 'sigmoid_norm',
  route_scale: float = 2.5,
  balance_bias: bool = True,
  init_std: float | None = None,
  **options,
) -> Router:
  """Top-k within the best groups of consecutive experts.

  A group's score is the sum of its best selection scores `sigmoid(logit) + bias`; the k best experts of the best
  groups are chosen, and weighted by `route_scale * sigmoid(logit)` over its sum, without bias. DeepSeek-V3 has 256
  experts with k = 8, groups = 8, limit = 4, a bias step of 0.001 and `sequence_balance` of 0.0001. DeepSeek-V2 is
  `best=1, weighting='softmax_topk', route_scale=16.0, balance_bias=False`, 3 of 8 groups; Megatron's general form has
  `best = k / limit`. Groups left out score -inf (a fill of zero, which some ports have, is wrong where the bias
  makes scores negative). The loss `cluster_balance` balances groups: with `limit=groups, weighting='softmax_topk',
  route_scale=1.0, balance_bias=False` these are DeepSeekMoE's experts on so many devices, and it is their device-level
  loss (0.05 beside `balance` of 0.003 at 145 billion parameters; 0.01 and no device-level loss at 2 billion).

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    k: choices of a token.
    groups: into how many the experts are cut.
    limit: how many of them a token may use.
    best: how many experts make the score of a group.
    weighting, route_scale, balance_bias, options: of `token_choice`.
    init_std: see `LinearScorer`.

  Raises:
    ValueError: groups that do not divide E, other options out of their range.
  """
  if groups < 1 or num_experts % groups:
    raise ValueError(f'groups={groups} does not divide num_experts={num_experts}')
  size = num_experts // groups
  if not 1 <= limit <= groups:
    raise ValueError(f'limit={limit} with groups={groups}: accepted are 1 to {groups}')
  check_from_one(best=best)
  if k > limit * size:
    raise ValueError(
      f'k={k} with limit={limit} of groups={groups} of {size}: accepted are 1 to {limit * size}'
    )
  return token_choice(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    num_experts=num_experts,
    k=k,
    affinity=functools.partial(
      GroupLimitedAffinity, groups=groups, limit=limit, best=min(best, size)
    ),
    weighting=weighting,
    route_scale=route_scale,
    balance_bias=balance_bias,
    **options,
  )
