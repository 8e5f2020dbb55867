"""A lossy exchange that loses nothing: rows without a place go another way, in the steps where there are any."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.layout import Exchange
from moejax.moe.experts import Experts


@dataclasses.dataclass(frozen=True)
class WithFallback:
  """`first`, and for the rows that it lost `second`, behind a condition on all devices together.

  Buffers can then have the size that is needed nearly always. Nothing of the second way is kept for the backward pass
  but its inputs, so a step without overflow has the memory of the first alone.

  Attributes:
    first: an exchange that may lose rows.
    second: one that never does.
  """

  first: Exchange
  second: Exchange

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, None]:
    """The weighted outputs; nothing is lost."""
    y_td, lost_r = self.first(x_td, assignment, experts, dispatch)
    if lost_r is None:
      return y_td, None
    rest = dataclasses.replace(
      assignment,
      expert=jnp.where(lost_r, assignment.expert, assignment.num_experts),
      weight=jnp.where(lost_r, assignment.weight, 0),
    )
    again = jax.checkpoint(lambda x_td, rest: self.second(x_td, rest, experts, dispatch)[0])
    more_td = jax.lax.cond(lost_r.any(), again, lambda x_td, rest: jnp.zeros_like(y_td), x_td, rest)
    return y_td + more_td, None

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, of which none is ever lost."""
    return self.first.slots(slots_bepd, experts)
