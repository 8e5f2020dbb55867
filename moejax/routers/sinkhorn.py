"""Sinkhorn routing: choices by an entropic transport plan that gives every expert the same mass.

Token choice: S-BASE of Clark et al. 2022, "Unified scaling laws for routed language models", and Megatron. Both
directions: Liu et al. 2024, "Routers in vision mixture of experts".
"""

from __future__ import annotations

import dataclasses
import functools

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
from moejax.routers.scorers import LinearScorer
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


def _grouped_plan(
  logits_bse: Array,
  group: str,
  group_size: int | None,
  context: Context,
  temperature: float,
  iterations: int,
) -> Array:
  """The plan of every routing group, `[B, S, E]`, without gradient."""
  logits_gte = to_groups(jax.lax.stop_gradient(logits_bse), group, group_size)
  real = None if context.mask is None else to_groups(context.mask, group, group_size)
  plan_gte = sinkhorn_plan(logits_gte, real, temperature=temperature, iterations=iterations)
  return from_groups(plan_gte, group, (logits_bse.shape[0], logits_bse.shape[1]))


@dataclasses.dataclass(frozen=True)
class SinkhornAffinity:
  """`TokenAffinity` whose selection score is the plan.

  Attributes:
    function, k: see `TokenAffinity`.
    group: 'sequence' or 'batch', the tokens of one plan.
    temperature, iterations: see `sinkhorn_plan`.
    plan_in_eval: outside of training too, else the logits select there.
  """

  function: str
  k: int
  group: str
  temperature: float
  iterations: int
  plan_in_eval: bool

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    if not context.train and not self.plan_in_eval:
      return scores
    how = (self.temperature, self.iterations)
    plan_bse = _grouped_plan(scores.select, self.group, None, context, *how)
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
      temperature=temperature,
      iterations=iterations,
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
class SinkhornExpertAffinity:
  """Softmax gates over experts, selection by the plan.

  Attributes:
    group, group_size: the tokens of one plan, see `to_groups`.
    temperature, iterations: see `sinkhorn_plan`.
  """

  group: str
  group_size: int | None
  temperature: float
  iterations: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias: Array | None, context: Context
  ) -> Scores:
    scores = ExpertAffinity('experts', self.group)(logits_bse, std, bias, context)
    where = (self.group, self.group_size, context, self.temperature, self.iterations)
    return dataclasses.replace(scores, select=_grouped_plan(logits_bse, *where))


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
  check_name('group', group, GROUPS)
  _check(temperature, iterations)
  if not capacity_factor > 0:
    raise ValueError(f'capacity_factor={capacity_factor}: accepted are positive numbers')
  safe = group == 'position'
  return Router(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    SinkhornExpertAffinity(group, group_size, temperature, iterations),
    ExpertChoiceAssign(capacity_factor, group, group_size=group_size),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=safe,
      prefix_safe_eval=safe,
      batch_free=group == 'sequence',
      stays_in_sequence=group == 'sequence',
    ),
    choices=min(capacity_factor, num_experts),
  )


def _check(temperature: float, iterations: int) -> None:
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: accepted are positive numbers')
  if iterations < 1:
    raise ValueError(f'iterations={iterations}: accepted are integers from 1')
