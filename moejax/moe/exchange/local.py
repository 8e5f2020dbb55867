"""Tokens stay; weights come to them."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.layout import Layout, exchange_rows, exchange_slots
from moejax.moe.experts import Experts


@dataclasses.dataclass(frozen=True)
class Local(Layout):
  """Every device works on its own tokens with all experts: nothing but weights and their gradients travels.

  With experts on one device along the expert axis this is plain data parallelism; where they are sharded, their weights
  are gathered for the time of the layer, as FSDP does it.

  Raises:
    ValueError: routing groups that span the shards of the batch.
  """

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, None]:
    """The weighted outputs; nothing is lost."""
    if x_td.shape[0] % self.shards == 0 and assignment.groups % self.shards:
      raise ValueError(
        f"exchange='local' with routing groups that span the {self.shards} shards of the batch: accepted is "
        "exchange='all_gather', or a router whose rows stay in their sequence"
      )

    def body(x_td, rows, bank):
      return bank(x_td, rows.assignment(x_td.shape[0])), None

    y_td, _ = exchange_rows(self, x_td, assignment, experts, dispatch, body, gather_experts=True)
    return y_td, None

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, made where they are."""
    return exchange_slots(self, slots_bepd, experts, gather_experts=True)
