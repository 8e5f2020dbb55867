"""Tokens are gathered over the expert axis, outputs reduced and scattered back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.layout import Bank, Layout, exchange_rows, exchange_slots
from moejax.moe.exchange.rows import Rows
from moejax.moe.experts import Experts


@dataclasses.dataclass(frozen=True)
class AllGather(Layout):
  """One dense collective each way and no counts to exchange: the default for expert axes up to 8.

  Every token travels to every device of its expert group, whatever it chose, so nothing is ever lost.
  """

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, None]:
    """The weighted outputs; nothing is lost."""

    def body(x_td, rows, bank):
      return gather_and_scatter(x_td, rows, bank, self.expert_axis), None

    y_td, _ = exchange_rows(self, x_td, assignment, experts, dispatch, body)
    return y_td, None

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, which travel alone."""
    return exchange_slots(self, slots_bepd, experts)


def gather_and_scatter(x_td: Array, rows: Rows, bank: Bank, axis: str) -> Array:
  """The weighted outputs of this device's tokens, made by all devices along the axis together."""
  index, local = jax.lax.axis_index(axis), bank.experts.num_experts
  token_r = rows.token + index * x_td.shape[0]
  gather = lambda a: jax.lax.all_gather(a, axis, tiled=True)
  expert_r = gather(rows.expert) - index * local
  own_r = (expert_r >= 0) & (expert_r < local)
  own = Rows(
    token=gather(token_r),
    expert=jnp.where(own_r, expert_r, local),
    weight=jnp.where(own_r, gather(rows.weight), 0),
    num_experts=local,
    choices=rows.choices,
    expected=rows.expected,
  )
  x_td = gather(x_td)
  y_td = bank(x_td, own.assignment(x_td.shape[0]))
  return jax.lax.psum_scatter(y_td, axis, scatter_dimension=0, tiled=True)
