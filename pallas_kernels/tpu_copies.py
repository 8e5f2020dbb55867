"""Segments on their way between the memories of TPUs, inside of a kernel: one copy each, all under way at once.

A copy has as many rows as its segment. It counts its bytes on a semaphore of the receiver, one for each i, so that the
segments i of all devices can be waited for by themselves.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import compat
from .registry import Unsupported
from .segments import CHUNK, Route

Array = jax.Array


class Tables(NamedTuple):
  """What a device must know of the segments that it sends, int32 `[P * E]`, and receives.

  Attributes:
    take: first row here.
    put: first row there.
    rows: rows that travel.
    coming: int32 `[E]`, rows that come from all devices.
    place: int32, where this device is along each of `axes()`.
  """

  take: Array
  put: Array
  rows: Array
  coming: Array
  place: Array


def axes() -> tuple[str, ...]:
  """The mesh around this. A kernel names devices by all of its axes: jax 0.10 cannot add those that are left out."""
  return jax.sharding.get_abstract_mesh().axis_names


def tables(route: Route, axis_name: str) -> Tables:
  """Of this device."""
  me = jax.lax.axis_index(axis_name)
  take, put, rows = (table[me].reshape(-1) for table in (route.take, route.put, route.copied))
  coming = jnp.sum(route.copied[:, me], axis=0, dtype=jnp.int32)
  place = compat.vary_together(*(jax.lax.axis_index(axis) for axis in axes()))
  return Tables(take, put, rows, coming, jnp.stack(place))


def check(operation: str, *others, **rows) -> None:
  """Refuses rows that copies cannot be made of, and types of `others` that come with them.

  Raises:
    Unsupported: float16 or float64, no rows, or no multiple of CHUNK.
  """
  for name, x in rows.items():
    types = {str(array.dtype) for array in (x, *others)}
    if not types <= {'bfloat16', 'float32'} or x.shape[0] % CHUNK or not x.shape[0]:
      raise Unsupported(
        f'{operation} on TPU: {name} {x.dtype}{x.shape}{_and(others)}; bfloat16 and float32 and multiples of {CHUNK} '
        'rows are supported'
      )


def _and(others):
  return ''.join(f' and {x.dtype}{x.shape}' for x in others)


def semaphores(count: int) -> list:
  """Of the copies that a device sends, and of the `count` kinds of segments that it receives."""
  return [pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA((count,))]


class Copies:
  """The copies of one kernel, from `source` here to `target` there.

  Args:
    tables: references to those of `tables`.
    source, target: `[R, D]` in the memories of the devices.
    sent, arrived: of `semaphores`.
    axis_name: the mesh axis.
    axes: all of them.
  """

  def __init__(self, tables: Tables, source, target, sent, arrived, axis_name: str, axes):
    self.tables, self.source, self.target = tables, source, target
    self.sent, self.arrived = sent, arrived
    self.place = {axis: tables.place[i] for i, axis in enumerate(axes)}
    self.axis_name, self.me = axis_name, self.place[axis_name]
    self.count = tables.coming.shape[0]
    self.devices = tables.rows.shape[0] // self.count

  def meet(self) -> None:
    """No device writes into another's memory before that one has come here."""
    barrier = pltpu.get_barrier_semaphore()
    for device in range(self.devices):
      pl.semaphore_signal(barrier, 1, device_id=self._at(jnp.int32(device)))
    pl.semaphore_wait(barrier, self.devices)

  def send(self, i) -> None:
    """Starts the copies of segments `i` to all devices, each with another neighbour first: none gets all at once."""

    def to(step, _):
      device = jax.lax.rem(self.me + step, jnp.int32(self.devices))
      at = device * self.count + i
      take, put, rows = self.tables.take[at], self.tables.put[at], self.tables.rows[at]
      pl.when(rows > 0)(lambda: self._copy(device, i, take, put, rows).start())

    jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.devices), to, None)

  def send_all(self) -> None:
    """Of every i, the first ones first."""
    jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.count), lambda i, _: self.send(i), None)

  def wait_for(self, i) -> None:
    """Until segments `i` of all devices have come."""
    _wait(self.target, self.tables.coming[i], self.arrived.at[i])

  def wait_for_all(self) -> None:
    """Until everything has come."""
    jax.lax.fori_loop(jnp.int32(0), jnp.int32(self.count), lambda i, _: self.wait_for(i), None)

  def wait_sent(self) -> None:
    """Until all that was sent has been read, so that the kernel may end."""
    rows = self.tables.rows
    add = lambda at, total: total + rows[at]
    total = jax.lax.fori_loop(jnp.int32(0), jnp.int32(rows.shape[0]), add, jnp.int32(0))
    _wait(self.source, total, self.sent)

  def _copy(self, device, i, take, put, rows):
    return pltpu.make_async_remote_copy(
      self.source.at[span(take, rows)],
      self.target.at[span(put, rows)],
      self.sent,
      self.arrived.at[i],
      device_id=self._at(device),
    )

  def _at(self, device):
    return self.place | {self.axis_name: device}


def span(first, rows):
  """The rows `first..first + rows`, both multiples of CHUNK."""
  first = first if isinstance(first, int) else pl.multiple_of(first, CHUNK)
  return pl.ds(first, pl.multiple_of(rows, CHUNK))


def _wait(ref, rows, semaphore):
  """Takes as many bytes off a semaphore as a copy of these rows has, whichever copies they were of."""
  like = lambda: ref.at[span(0, rows)]
  pl.when(rows > 0)(lambda: pltpu.make_async_copy(like(), like(), semaphore).wait())
