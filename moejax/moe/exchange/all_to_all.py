"""Rows travel to the devices of their experts: places of a fixed number for every destination."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.hop import Line, hop, in_chunks, places
from moejax.moe.exchange.layout import Layout, exchange_rows, exchange_slots
from moejax.moe.experts import Experts


@dataclasses.dataclass(frozen=True)
class AllToAll(Layout):
  """Each row travels once to its expert and once back (GShard, Lepikhin et al. 2020, section 3.2).

  Attributes:
    capacity_factor: places for a destination, over the rows that it would get of this device were all destinations
      alike; rows that find none are lost, and counted. 0: as many as there can be rows, and none is lost.
    chunks: parts that the tokens of a device travel in.
  """

  capacity_factor: float | int = 2.0
  chunks: int = 1

  def __post_init__(self):
    super().__post_init__()
    check_options(capacity_factor=self.capacity_factor, chunks=self.chunks)

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, Array]:
    """The weighted outputs, and the rows that found no place."""
    line = Line(self.expert_axis, self.owners, experts.num_experts)

    def body(x_td, rows, bank):
      def one(x_td, rows):
        capacity = places(self.capacity_factor, rows.expected, self.owners, rows.token.size)
        return hop(x_td, rows, line, capacity, lambda x_ud, e_u: (bank.each(x_ud, e_u), None))

      return in_chunks(x_td, rows, self.chunks, one)

    return exchange_rows(self, x_td, assignment, experts, dispatch, body)

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, which travel alone."""
    return exchange_slots(self, slots_bepd, experts)


def check_options(*, chunks: int, **factors: float | int) -> None:
  """Refuses options out of their range.

  Raises:
    ValueError: with the option and its value.
  """
  if chunks < 1:
    raise ValueError(f'chunks={chunks}: accepted are integers from 1')
  for name, value in factors.items():
    if not value >= 0:
      raise ValueError(f'{name}={value}: accepted are numbers from 0')
