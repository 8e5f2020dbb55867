"""Dispatch and combine: three ways from tokens and an assignment to the weighted outputs.

All are functions `(x_td, assignment, experts) -> y_td` and agree in value and gradient; the layer takes one as
a value. `fused` is the fast one, `sorted_rows` the flow in plain sight, `einsum` the definition by masks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.arrays import Assignment
from moejax.moe.experts import Experts

Dispatch = Callable[[Array, Assignment, Experts], Array]


def dispatch(
  x_td: Float[Array, 'T D'], assignment: Assignment
) -> tuple[Float[Array, 'R D'], Int[Array, ' E'], Assignment]:
  """Rows sorted by expert: `(x_rd, group_sizes_e, assignment in that order)`; dropped rows come last."""
  order_r = jnp.argsort(assignment.expert, stable=True)
  group_sizes_e = jnp.bincount(assignment.expert, length=assignment.num_experts + 1)[:-1]
  in_order = dataclasses.replace(
    assignment,
    token=assignment.token[order_r],
    expert=assignment.expert[order_r],
    weight=assignment.weight[order_r],
    chosen=assignment.chosen[order_r],
    groups=1,
  )
  return x_td[in_order.token], group_sizes_e.astype(jnp.int32), in_order


def combine(
  y_rd: Float[Array, 'R D'], assignment: Assignment, *, num_tokens: int
) -> Float[Array, 'T D']:
  """Weighted sum of a token's rows. Masked before the weight is applied, so that no NaN crosses over."""
  kept_r = assignment.expert < assignment.num_experts
  y_rd = jnp.where(kept_r[:, None], y_rd, 0) * assignment.weight.astype(y_rd.dtype)[:, None]
  return jnp.zeros((num_tokens, y_rd.shape[1]), y_rd.dtype).at[assignment.token].add(y_rd)


def fused(
  x_td: Float[Array, 'T D'],
  assignment: Assignment,
  experts: Experts,
  *,
  implementation: str | None = None,
) -> Float[Array, 'T D']:
  """One operation with a backward of its own (pallas_kernels/expert_ffn)."""
  return experts.ffn(x_td, assignment, implementation=implementation)


def sorted_rows(
  x_td: Float[Array, 'T D'],
  assignment: Assignment,
  experts: Experts,
  *,
  implementation: str | None = None,
) -> Float[Array, 'T D']:
  """dispatch -> experts -> combine."""
  x_rd, group_sizes_e, assignment = dispatch(x_td, assignment)
  y_rd = experts(x_rd, group_sizes_e, implementation=implementation)
  return combine(y_rd, assignment, num_tokens=x_td.shape[0])


def einsum(
  x_td: Float[Array, 'T D'], assignment: Assignment, experts: Experts
) -> Float[Array, 'T D']:
  """Every expert on every token, then the `[T, E]` combine weights: E times the work, no sort, no gather."""
  weight_te = jnp.zeros((x_td.shape[0], assignment.num_experts + 1), assignment.weight.dtype)
  weight_te = weight_te.at[assignment.token, assignment.expert].add(assignment.weight)[:, :-1]
  x_bepd = jnp.broadcast_to(x_td[None, None], (1, experts.num_experts, *x_td.shape))
  y_etd = experts.slots(x_bepd)[0]
  return jnp.einsum('TE,ETD->TD', weight_te.astype(y_etd.dtype), y_etd)


ON_KERNELS: dict[str, Callable[..., Array]] = {'fused': fused, 'sorted': sorted_rows}
"""Short name -> dispatch whose kernels can be asked for by name."""

DISPATCHES: dict[str, Dispatch] = {'einsum': einsum, **ON_KERNELS}
"""Short name -> dispatch."""


def make_dispatch(name: str, implementation: str | None = None) -> Dispatch:
  """The dispatch of this short name, on the kernels of this name (pallas_kernels/README.md).

  Args:
    name: a key of `DISPATCHES`.
    implementation: 'ampere', 'blocks', 'cpu', 'gpu', 'tpu' or 'reference', which then never falls back; None: the
      platform's.

  Raises:
    ValueError: an unknown name, or an implementation for a dispatch without kernels.
  """
  if name not in DISPATCHES:
    raise ValueError(f'dispatch={name!r}: accepted are {", ".join(map(repr, DISPATCHES))}')
  if implementation is None:
    return DISPATCHES[name]
  if name not in ON_KERNELS:
    accepted = ', '.join(map(repr, ON_KERNELS))
    raise ValueError(f'{implementation=} with dispatch={name!r}: accepted are {accepted}')
  return functools.partial(ON_KERNELS[name], implementation=implementation)
