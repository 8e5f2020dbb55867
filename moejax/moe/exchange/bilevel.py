"""Two hops: to the node of the expert, then to its device inside of that node."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.all_to_all import check_options
from moejax.moe.exchange.hop import Line, hop, in_chunks, places
from moejax.moe.exchange.layout import Layout, check_divides, exchange_rows, exchange_slots
from moejax.moe.exchange.rows import Rows
from moejax.moe.experts import Experts


@dataclasses.dataclass(frozen=True)
class Bilevel(Layout):
  """Hierarchical all-to-all (SMILE, He et al. 2022; Tutel, Hwang et al. 2023).

  The expert axis is n nodes of m devices, the devices of a node next to each other. Between nodes a device talks to one
  device of each other node, with messages m times as large as in a plain all-to-all, and the rest of the way is inside
  of the node: n + m messages of a device instead of n * m.

  Attributes:
    nodes: n, a divisor of the expert axis.
    capacity_factor, chunks: as of `AllToAll`; of either hop.
  """

  nodes: int = 1
  capacity_factor: float | int = 2.0
  chunks: int = 1

  def __post_init__(self):
    super().__post_init__()
    check_options(capacity_factor=self.capacity_factor, chunks=self.chunks)
    if self.nodes < 1 or self.owners % self.nodes:
      raise ValueError(
        f'nodes={self.nodes} does not divide mesh axis {self.expert_axis}={self.owners}'
      )

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, Array]:
    """The weighted outputs, and the rows that found no place in either hop."""
    check_divides('num_experts', experts.num_experts, (self.expert_axis,), self.owners)
    nodes, devices, axis = self.nodes, self.owners // self.nodes, self.expert_axis
    across = tuple(tuple(range(i, self.owners, devices)) for i in range(devices))
    within = tuple(tuple(range(i * devices, (i + 1) * devices)) for i in range(nodes))
    between = Line(axis, nodes, experts.num_experts, across)
    inside = Line(axis, devices, experts.num_experts // nodes, within)

    def body(x_td, rows, bank):
      def one(x_td, rows):
        capacity = places(self.capacity_factor, rows.expected, nodes, rows.token.size)

        def second(x_ud, expert_u):
          token_u = jnp.arange(expert_u.size, dtype=jnp.int32)
          arrived = Rows(token_u, expert_u, expert_u, inside.num_experts, 1, rows.expected)
          room = places(self.capacity_factor, rows.expected, devices, expert_u.size)
          return hop(x_ud, arrived, inside, room, lambda x, e: (bank.each(x, e), None))()

        return hop(x_td, rows, between, capacity, second)

      return in_chunks(x_td, rows, self.chunks, one)

    return exchange_rows(self, x_td, assignment, experts, dispatch, body)

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, which travel alone."""
    return exchange_slots(self, slots_bepd, experts)
