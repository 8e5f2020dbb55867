"""One device: nothing travels."""

from __future__ import annotations

from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.experts import Experts


class Single:
  """Works where the tokens are; `single` is the one of its kind."""

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, None]:
    """The weighted outputs; nothing is lost."""
    return dispatch(x_td, assignment, experts), None

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Every expert on its own slots."""
    return experts.slots(slots_bepd)


single = Single()
