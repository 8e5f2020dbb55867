"""The definition of correct: a loop over experts, tokens and rows in plain array operations, in any precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.arrays import Assignment, SoftPlan
from moejax.moe.experts import Experts
from moejax.moe.zero_computation import ZeroExperts


def moe(
  x: Float[Array, '*batch S D'],
  plan: Assignment | SoftPlan,
  experts: Experts | Sequence[Callable[[Array], Array]],
  zero: ZeroExperts | None = None,
) -> Float[Array, '*batch S D']:
  """Output of a routed layer by definition; differentiable, slow, in the type of `x`.

  Args:
    x: tokens.
    plan: rows `(token, expert, weight)`, or dense `[..., S, E, P]` dispatch and combine tensors.
    experts: a bank, or one function `[D] -> [D]` an expert. Rows of experts past these give nothing.
    zero: the experts without computation that follow them.
  """
  if isinstance(experts, Experts):
    experts = [experts.expert(e) for e in range(experts.num_experts)]
  if zero is not None:
    experts = [*experts, *(zero.expert(e) for e in range(zero.num_experts))]
  if isinstance(plan, SoftPlan):
    return _soft(x, plan, experts)
  x_td = x.reshape(-1, x.shape[-1])

  def one_token(t, x_d):
    y_d = jnp.zeros_like(x_d)
    for e, expert in enumerate(experts):
      mine_r = (plan.token == t) & (plan.expert == e)
      weight = jnp.where(mine_r, plan.weight, 0).sum().astype(x_d.dtype)
      y_d = y_d + jnp.where(mine_r.any(), expert(x_d), 0) * weight
    return y_d

  y_td = jax.vmap(one_token)(jnp.arange(x_td.shape[0], dtype=jnp.int32), x_td)
  return y_td.reshape(x.shape)


def _soft(x: Array, plan: SoftPlan, experts: Sequence[Callable[[Array], Array]]) -> Array:
  if plan.across:  # sequences and positions change places
    parts = []
    for first in range(0, x.shape[0], plan.across):
      part = slice(first, first + plan.across)
      dispatch, combine, mixed = (
        jnp.swapaxes(a[part], 0, 1) for a in (plan.dispatch, plan.combine, x)
      )
      parts.append(jnp.swapaxes(_soft(mixed, SoftPlan(dispatch, combine), experts), 0, 1))
    return jnp.concatenate(parts)
  y = jnp.zeros_like(x)
  for e, expert in enumerate(experts):
    for p in range(plan.dispatch.shape[-1]):
      share = plan.dispatch[..., e, p][..., None].astype(x.dtype)  # [..., S, 1]
      slot = expert((share * x).sum(-2))  # [..., D]
      y = y + plan.combine[..., e, p][..., None].astype(x.dtype) * slot[..., None, :]
  return y
