"""Rows travel to the devices of their experts in messages as long as they need to be."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.all_to_all import check_options
from moejax.moe.exchange.hop import Inside, Line, Trip, in_chunks, places, spread
from moejax.moe.exchange.layout import Layout, exchange_rows, exchange_slots
from moejax.moe.exchange.one_kernel import check_kernel, in_one_kernel
from moejax.moe.exchange.rows import Rows, take
from moejax.moe.experts import Experts
from moejax.routers.capacity import rank_within
from pallas_kernels.compat import vary_together, varying_axes


@dataclasses.dataclass(frozen=True)
class RaggedAllToAll(Layout):
  """`jax.lax.ragged_all_to_all` where the hardware has it, and what it does, by a gather, on CPUs.

  Attributes:
    buffer_factor: places of a device for rows of all others together, over the rows that it would get were all devices
      alike; rows that find none are lost, and counted. 0: as many as there can be rows, and none is lost.
    chunks: parts that the tokens of a device travel in.
    kernel: 'tpu': rows travel in the kernels of the experts' matmuls, whatever the dispatch, so that products of some
      experts are made beside the transfer of others' rows (pallas_kernels/exchange_matmul; interpreted and compiled for
      TPUs, not timed). Where there is no place it is rows of the last experts of a device that are lost. 'reference':
      the same by an all-gather, on any device. None: transfers by XLA, then the dispatch.
  """

  buffer_factor: float | int = 0.0
  chunks: int = 1
  kernel: str | None = None

  def __post_init__(self):
    super().__post_init__()
    check_options(buffer_factor=self.buffer_factor, chunks=self.chunks)
    check_kernel(self.kernel, self.mesh, self.width, self.chunks)

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, Array]:
    """The weighted outputs, and the rows that found no place."""
    line = Line(self.expert_axis, self.owners, experts.num_experts)

    def body(x_td, rows, bank):
      if self.kernel is not None:
        longest = _longest(rows, x_td.shape[0])
        buffer = places(self.buffer_factor, rows.expected, 1, self.owners * longest)
        return in_one_kernel(x_td, rows, line, longest, buffer, bank.experts, self.kernel)

      def one(x_td, rows):
        most = self.owners * _longest(rows, x_td.shape[0])
        buffer = places(self.buffer_factor, rows.expected, 1, most)
        work = lambda x_ud, expert_u: (bank.each(x_ud, expert_u), None)
        return ragged_hop(x_td, rows, line, buffer, work)

      return in_chunks(x_td, rows, self.chunks, one)

    return exchange_rows(self, x_td, assignment, experts, dispatch, body)

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of slots, which travel alone."""
    return exchange_slots(self, slots_bepd, experts)


def _longest(rows: Rows, num_tokens: int) -> int:
  """Rows that one device can have: no token is twice with an expert."""
  return min(rows.token.size, num_tokens * rows.num_experts)


def ragged_hop(x_td: Array, rows: Rows, line: Line, buffer: int, inside: Inside) -> Trip:
  """As `hop`, with one buffer for the rows of all senders, which fill it in the order of the devices."""
  num_rows = rows.expert.size
  length = _longest(rows, x_td.shape[0])
  owner_r = jnp.minimum(rows.expert // line.each, line.size)
  counts_z = jnp.bincount(owner_r, length=line.size + 1)[:-1].astype(jnp.int32)
  there, back, fits_z = plan_routes(counts_z, line.axis, buffer)
  rank_r = rank_within(owner_r, line.size)
  wanted_r = owner_r < line.size
  place_r = jnp.where(wanted_r, there.start.at[owner_r].get(mode='clip') + rank_r, length)
  row_u = jnp.full((length + 1,), num_rows, jnp.int32)
  row_u = row_u.at[place_r].set(jnp.arange(num_rows, dtype=jnp.int32))[:-1]
  expert_u = jnp.where(
    row_u < num_rows, rows.expert.at[row_u].get(mode='clip') % line.each, line.each
  )

  def send(x_ud, expert_u):
    x_ud = travel(x_ud, buffer, there, back, line.axis)
    # counted from 1, so that places that nothing arrives at are none of the experts
    expert_u = _ragged(expert_u + 1, buffer, there, line.axis)
    return x_ud, jnp.where(expert_u > 0, expert_u - 1, line.each)

  def come_back(y_ud, lost_u):
    if lost_u is not None:
      raise ValueError('a ragged exchange is the last of several')
    y_rd = take(travel(y_ud, length, back, there, line.axis), place_r, row_u)
    return y_rd, wanted_r & (rank_r >= fits_z.at[owner_r].get(mode='clip'))

  return Trip((spread(x_td, rows, row_u, place_r), expert_u), send, inside, come_back)


class Route(NamedTuple):
  """Where each piece starts and how long it is, `[Z]` each, by the device it goes to (or, `received`, comes from)."""

  start: Array
  sent: Array
  there: Array
  received: Array


def plan_routes(counts_z: Array, axis: str, buffer: int) -> tuple[Route, Route, Array]:
  """Routes there and back of pieces of these lengths, cut to what fits a buffer, and the lengths that fit."""
  index = jax.lax.axis_index(axis)
  counts = jax.lax.all_gather(counts_z, axis)  # [from, to]
  first = jnp.cumsum(counts, 0) - counts  # where a piece starts in the buffer of `to`
  fits = jnp.clip(buffer - first, 0, counts)
  starts = jnp.cumsum(counts, 1) - counts  # where it starts at `from`
  first = jnp.minimum(first, buffer)
  there = Route(starts[index], fits[index], first[index], fits[:, index])
  back = Route(first[:, index], fits[:, index], starts[:, index], fits[index])
  return there, back, fits[index]


def travel(x_ud: Array, size: int, route: Route, reverse: Route, axis: str) -> Array:
  """Pieces of `x_ud` into a buffer of `size` places, zeros elsewhere; gradients go the other way."""
  num = x_ud.shape[0]

  @jax.custom_vjp
  def send(x_ud, route, reverse):
    return _ragged(x_ud, size, route, axis)

  def backward(reverse, d_ud):
    return _ragged(d_ud, num, reverse, axis), None, None

  send.defvjp(lambda x_ud, route, reverse: (send(x_ud, route, reverse), reverse), backward)
  return send(x_ud, route, reverse)


def _ragged(x: Array, size: int, route: Route, axis: str) -> Array:
  """Pieces of x to the devices along the axis, by the operation that the platform has."""
  x, *route = vary_together(x, *route)
  out = jnp.zeros((size, *x.shape[1:]), x.dtype)
  out = jax.lax.pcast(out, tuple(sorted(varying_axes(x))), to='varying')

  def hardware(x, out, *route):
    return jax.lax.ragged_all_to_all(x, out, *route, axis_name=axis)

  def emulated(x, out, *route):
    return _gathered(x, out, Route(*route), axis)

  return jax.lax.platform_dependent(x, out, *route, cpu=emulated, default=hardware)


def _gathered(x: Array, out: Array, route: Route, axis: str) -> Array:
  """What `jax.lax.ragged_all_to_all` does, by gathering everything: XLA's CPU backend lacks the operation."""
  index = jax.lax.axis_index(axis)
  pieces = jax.lax.all_gather(x, axis)  # [from, ...]
  start, there, sent = (
    jax.lax.all_gather(a, axis)[:, index] for a in (route.start, route.there, route.sent)
  )
  place = jnp.arange(out.shape[0], dtype=jnp.int32)
  inside = (place[None] >= there[:, None]) & (place[None] < (there + sent)[:, None])  # [from, U]
  source = jnp.argmax(inside, 0)
  found = pieces[source, jnp.clip(place - there[source] + start[source], 0, x.shape[0] - 1)]
  arrived = inside.any(0).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(arrived, found, out)
