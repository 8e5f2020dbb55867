"""Weights of hot experts come to the tokens; other tokens go to their experts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.all_to_all import check_options
from moejax.moe.exchange.hop import Line, hop, in_chunks, places
from moejax.moe.exchange.layout import Layout, exchange_rows, exchange_slots
from moejax.moe.exchange.rows import Rows
from moejax.moe.experts import Experts


@dataclasses.dataclass(frozen=True)
class SparseFSDP(Layout):
  """Fully sharded sparse data parallelism (Hecate, Qing et al. 2025).

  Every expert, with its optimizer's moments, lies on one device along the expert axis. In each step the weights of the
  hottest are gathered by all (the paper's SparseAllGather) and their rows are worked on where they are, so that one
  crowded expert is no longer one crowded device; the rest travels as in `AllToAll`. Gradients of the copies are reduced
  and scattered to the owners (SparseReduceScatter), and the copies are gathered again in the backward pass, not kept.
  One expert costs `n - 1` times its weights to gather on n devices, whatever the number of tokens, and as much again
  for its gradient.

  How it deviates: the paper chooses copies by the loads of the last five steps and of any owner, as memory allows, and
  mends the choice after the gate; here every owner gives the same number, which makes the gather one dense collective,
  and loads are those of this step, which are known before anything travels. The choice changes no value.

  Attributes:
    hot: experts of each device that are copied to all along the expert axis.
    capacity_factor, chunks: as of `AllToAll`, of the rows of the other experts. Rows of hot experts take no place.
  """

  hot: int = 1
  capacity_factor: float | int = 1.0
  chunks: int = 1

  def __post_init__(self):
    super().__post_init__()
    check_options(capacity_factor=self.capacity_factor, chunks=self.chunks)
    if self.hot < 1:
      raise ValueError(f'hot={self.hot}: accepted are integers from 1')

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, Array]:
    """The weighted outputs, and the rows that found no place.

    Raises:
      ValueError: more hot experts than a device has.
    """
    axis, line = self.expert_axis, Line(self.expert_axis, self.owners, experts.num_experts)
    if self.hot > line.each:
      raise ValueError(f'hot={self.hot}: accepted are 1 to {line.each}, the experts of a device')

    def body(x_td, rows, bank):
      hot_ze = hottest(rows, line, self.hot)
      near, far = apart(rows, hot_ze)

      def one(x_td, far):
        capacity = places(self.capacity_factor, far.expected, self.owners, far.token.size)
        return hop(x_td, far, line, capacity, lambda x_ud, e_u: (bank.each(x_ud, e_u), None))

      copies = bank.gathered(hot_ze[jax.lax.axis_index(axis)], axis)
      far_td, lost_r = in_chunks(x_td, far, self.chunks, one)
      return copies(x_td, near.assignment(x_td.shape[0])) + far_td, lost_r

    return exchange_rows(
      self, x_td, assignment, experts, dispatch, body, body_gathers=self.owners > 1
    )

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, which travel alone: every expert has as many."""
    return exchange_slots(self, slots_bepd, experts)


def hottest(rows: Rows, line: Line, number: int) -> Int[Array, 'Z E']:
  """Of each device the experts, numbered within it, with most rows of all devices along the axis together.

  Of two with as many rows the first is the hotter.
  """
  load_e = jnp.bincount(rows.expert, length=line.num_experts + 1)[:-1].astype(jnp.int32)
  load_ze = jax.lax.psum(load_e, line.axis).reshape(line.size, line.each)
  return jax.lax.top_k(load_ze, number)[1].astype(jnp.int32)


def apart(rows: Rows, hot_ze: Int[Array, 'Z E']) -> tuple[Rows, Rows]:
  """Rows of the hot experts, which are numbered in the order of `hot_ze`, and those of the others."""
  num_experts, (size, number) = rows.num_experts, hot_ze.shape
  num_hot, each = size * number, num_experts // size
  first_z = each * jnp.arange(size, dtype=jnp.int32)
  place_e = jnp.full((num_experts + 1,), num_hot, jnp.int32)
  place_e = place_e.at[(first_z[:, None] + hot_ze).reshape(-1)].set(
    jnp.arange(num_hot, dtype=jnp.int32)
  )
  place_r = place_e[rows.expert]
  hot_r = place_r < num_hot
  near = dataclasses.replace(
    rows, expert=place_r, weight=jnp.where(hot_r, rows.weight, 0), num_experts=num_hot
  )
  far = dataclasses.replace(
    rows,
    expert=jnp.where(hot_r, num_experts, rows.expert),
    weight=jnp.where(hot_r, 0, rows.weight),
  )
  return near, far
