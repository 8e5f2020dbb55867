"""Sinkhorn routing: choices by an entropic transport plan that gives every expert the same mass.

Token choice: S-BASE of Clark et al. 2022, "Unified scaling laws for routed language models", and Megatron. Both
directions: Liu et al. 2024, "Routers in vision mixture of experts".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.expert_choice import (
  GROUPS,
  ExpertAffinity,
  ExpertChoiceAssign,
  from_groups,
  to_groups,
)
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import LinearScorer, check_from_one
from moejax.routers.top_k import check_name, token_choice

BY_LOGARITHMS = 10
"""One round of so many."""


def sinkhorn_plan(
  logits: Float[Array, 'G T E'],
  real: Bool[Array, 'G T'] | None = None,
  *,
  temperature: float = 1.0,
  iterations: int = 20,
) -> Float[Array, 'G T E']:
  """`exp(u_t + logits / temperature + v_e)` with rows that sum to 1 and columns that sum to T / E.

  Columns and rows are scaled in turn, rows last. It does not change when a constant is added to the logits of a token
  or to those of an expert: one round of ten is on logarithms, so that no logit overflows; the others scale what it
  leaves, without an exponential.

  Args:
    logits: affinities.
    real: False for padding, whose rows are zero and not counted in T.
    temperature: weight of the plan's entropy; small ones come close to a balanced assignment.
    iterations: rounds.
  """
  dtype, num_experts = logits.dtype, logits.shape[-1]
  logits = logits / jnp.asarray(temperature, dtype)
  real = jnp.ones(logits.shape[:2], bool) if real is None else real
  mass_g = jnp.maximum(real.sum(1).astype(dtype), 1) / jnp.asarray(num_experts, dtype)
  logits = jnp.where(real[..., None], logits, 0)

  def rows(v_ge):
    return -jax.nn.logsumexp(logits + v_ge[:, None], -1)

  def scaled(v_ge):
    plan = jnp.exp(logits + rows(v_ge)[..., None] + v_ge[:, None])
    return jnp.where(real[..., None], plan, 0)

  def some_rounds(index, v_ge):
    mass_ge = jax.nn.logsumexp(logits + rows(v_ge)[..., None], 1, where=real[..., None])
    v_ge = jnp.maximum(jnp.log(mass_g)[:, None] - mass_ge, jnp.finfo(dtype).min)
    plan = scaled(v_ge)

    def one_round(_, scale_ge):
      row_gt = jnp.einsum('GTE,GE->GT', plan, scale_ge)
      column_ge = jnp.einsum('GTE,GT->GE', plan, 1 / jnp.maximum(row_gt, least))
      return mass_g[:, None] / jnp.maximum(column_ge, least)

    more = jnp.minimum(iterations - index * BY_LOGARITHMS, BY_LOGARITHMS)
    scale_ge = jax.lax.fori_loop(1, more, one_round, jnp.ones_like(v_ge))
    return v_ge + jnp.log(jnp.maximum(scale_ge, least))

  least = jnp.asarray(1e-30, dtype)
  turns = -(-iterations // BY_LOGARITHMS)
  return scaled(jax.lax.fori_loop(0, turns, some_rounds, jnp.zeros_like(logits[:, 0])))


Plan = Callable[[Array, Array | None], Array]
"""`(logits [G, T, E], real [G, T] or None) -> plan [G, T, E]`."""


def grouped_plan(
  plan: Plan, logits_bse: Array, group: str, group_size: int | None, context: Context
) -> Array:
  """The plan of every routing group, `[B, S, E]`, without gradient."""
  logits_gte = to_groups(jax.lax.stop_gradient(logits_bse), group, group_size)
  real = None if context.mask is None else to_groups(context.mask, group, group_size)
  return from_groups(plan(logits_gte, real), group, (logits_bse.shape[0], logits_bse.shape[1]))


@dataclasses.dataclass(frozen=True)
class SinkhornPlan:
  """`sinkhorn_plan` as a value: routers of equal options are equal, and stack."""

  temperature: float
  iterations: int

  def __call__(self, logits_gte: Array, real_gt: Array | None) -> Array:
    return sinkhorn_plan(
      logits_gte, real_gt, temperature=self.temperature, iterations=self.iterations
    )


@dataclasses.dataclass(frozen=True)
class SinkhornAffinity:
  """`TokenAffinity` whose selection score is the plan.

  Attributes:
    function, k: see `TokenAffinity`.
    group: 'sequence' or 'batch', the tokens of one plan.
    plan: of a group.
    plan_in_eval: outside of training too, else the logits select there.
  """

  function: str
  k: int
  group: str
  plan: Plan
  plan_in_eval: bool

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    if not context.train and not self.plan_in_eval:
      return scores
    plan_bse = grouped_plan(self.plan, scores.select, self.group, None, context)
    return dataclasses.replace(scores, select=plan_bse)


def sinkhorn(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 1,
  weighting: str | None = None,
  group: str = 'batch',
  temperature: float = 1.0,
  iterations: int = 20,
  plan_in_eval: bool = False,
  init_std: float | None = None,
  **options,
) -> Router:
  """Sinkhorn token choice: in training the k largest of a token's row of the plan, in evaluation of its logits.

  The plan has no gradient and needs no balance loss; its columns are equal, the numbers of tokens that choose an
  expert only roughly so: with `capacity_factor` they are bounded. In training a choice depends on all tokens of the
  group, later ones included.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    k: choices of a token.
    weighting: default as in Megatron: 'sigmoid' for k = 1, else 'softmax_topk'.
    group: 'sequence' or 'batch', the tokens of one plan.
    temperature, iterations: see `sinkhorn_plan`; 1 and 20 in Liu et al. Megatron iterates until the columns move by
      less than 1e-4.
    plan_in_eval: the plan selects in evaluation too (Liu et al., for images).
    init_std: see `LinearScorer`.
    options: of `token_choice`, but for the balancing bias.

  Raises:
    ValueError: an option out of its range.
  """
  check_name('group', group, ('sequence', 'batch'))
  _check(temperature, iterations)
  router = token_choice(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    num_experts=num_experts,
    k=k,
    affinity=functools.partial(
      SinkhornAffinity,
      group=group,
      plan=SinkhornPlan(temperature, iterations),
      plan_in_eval=plan_in_eval,
    ),
    weighting=weighting or ('sigmoid' if k == 1 else 'softmax_topk'),
    **options,
  )
  router.flags = dataclasses.replace(
    router.flags,
    prefix_safe_train=False,
    prefix_safe_eval=router.flags.prefix_safe_eval and not plan_in_eval,
    batch_free=router.flags.batch_free and group == 'sequence',
  )
  return router


@dataclasses.dataclass(frozen=True)
class PlannedExpertAffinity:
  """Softmax gates over experts, selection by a plan.

  Attributes:
    group, group_size: the tokens of one plan, see `to_groups`.
    plan: of a group.
  """

  group: str
  group_size: int | None
  plan: Plan

  def __call__(
    self, logits_bse: Array, std: Array | None, bias: Array | None, context: Context
  ) -> Scores:
    scores = ExpertAffinity('experts', self.group)(logits_bse, std, bias, context)
    plan_bse = grouped_plan(self.plan, logits_bse, self.group, self.group_size, context)
    return dataclasses.replace(scores, select=plan_bse)


def planned_expert_choice(
  scorer: Callable,
  plan: Plan,
  *,
  num_experts: int,
  capacity_factor: float,
  group: str,
  group_size: int | None,
  zeros: bool = True,
) -> Router:
  """Expert choice by the columns of a plan, weights softmax gates.

  Args:
    scorer: of the logits.
    plan: of a group.
    num_experts: E.
    capacity_factor: mean number of experts a token.
    group, group_size: see `to_groups`.
    zeros: see `ExpertChoiceAssign`.

  Raises:
    ValueError: an option out of its range.
  """
  check_name('group', group, GROUPS)
  if group_size is not None and (group != 'position' or group_size < 1):
    raise ValueError(
      f"group_size={group_size} with group={group!r}: accepted are None, or integers from 1 with group='position'"
    )
  if not capacity_factor > 0:
    raise ValueError(f'capacity_factor={capacity_factor}: accepted are positive numbers')
  safe, apart = group == 'position', group == 'sequence'
  return Router(
    scorer,
    PlannedExpertAffinity(group, group_size, plan),
    ExpertChoiceAssign(capacity_factor, group, group_size=group_size, zeros=zeros),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=safe, prefix_safe_eval=safe, batch_free=apart, stays_in_sequence=apart
    ),
    choices=min(capacity_factor, num_experts),
  )


def sinkhorn_expert_choice(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  capacity_factor: float = 1.0,
  group: str = 'sequence',
  group_size: int | None = None,
  temperature: float = 1.0,
  iterations: int = 20,
  init_std: float | None = None,
) -> Router:
  """Sinkhorn expert choice: every expert takes the C tokens with the largest entries in its column of the plan.

  Rows of the plan are equal, so that fewer tokens are left out than by softmax scores (Liu et al. 2024). The weights
  are softmax gates as in the released code, not the plan, which has no gradient.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    capacity_factor: mean number of experts a token.
    group, group_size: the tokens of one plan, see `moejax.routers.expert_choice.to_groups`; 'position' alone is
      prefix-safe.
    temperature, iterations: see `sinkhorn_plan`.
    init_std: see `LinearScorer`.

  Raises:
    ValueError: an option out of its range.
  """
  _check(temperature, iterations)
  return planned_expert_choice(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    SinkhornPlan(temperature, iterations),
    num_experts=num_experts,
    capacity_factor=capacity_factor,
    group=group,
    group_size=group_size,
  )


def _check(temperature: float, iterations: int) -> None:
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: accepted are positive numbers')
  check_from_one(iterations=iterations)
