"""Segments: rows that travel together from one device to another, and where they lie at both ends.

Each device has E segments for each other one, say the rows of each of its experts. At their sender they lie in the
order of (device, i), at their receiver in that of (i, device), so that rows for one i are neighbours there. Each begins
at a multiple of CHUNK, for a copy of a TPU begins and ends at whole tiles of its memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .packed import iota

Array = jax.Array
CHUNK = 16


class Route(NamedTuple):
  """All segments, int32 `[P, P, E]`: from, to, i.

  Attributes:
    take: first row at the sender.
    put: first row at the receiver.
    size: rows.
    copied: rows that travel: a multiple of CHUNK, less than `size` where one of both devices has no room for them.
  """

  take: Array
  put: Array
  size: Array
  copied: Array

  def back(self) -> 'Route':
    """The same segments on their way back."""
    swapped = (self.put, self.take, self.size, self.copied)
    return Route(*(table.swapaxes(0, 1) for table in swapped))


def route(sizes: Array, num_rows: int, num_out_rows: int) -> Route:
  """Where segments of `sizes [P, P, E]` lie in `num_rows` rows of each sender, `num_out_rows` of each receiver."""
  devices, _, count = sizes.shape
  whole = up(sizes)
  take = _firsts(whole.reshape(devices, -1)).reshape(sizes.shape)
  arriving = whole.transpose(1, 2, 0)  # [to, i, from]
  put = _firsts(arriving.reshape(devices, -1)).reshape(devices, count, devices)
  put = put.transpose(2, 0, 1)
  room = [n // CHUNK * CHUNK - first for n, first in ((num_rows, take), (num_out_rows, put))]
  return Route(take, put, sizes, jnp.clip(whole, 0, jnp.maximum(jnp.minimum(*room), 0)))


def up(sizes):
  """Rounded up to multiples of CHUNK."""
  return -(-sizes // CHUNK) * CHUNK


def _firsts(rows):
  return jnp.cumsum(rows, axis=-1, dtype=jnp.int32) - rows


class Held(NamedTuple):
  """The segments that a device has received, int32 `[P * E]`, device by device.

  Attributes:
    first: first row here.
    rows: rows that have come.
    origin: first row at the sender.
  """

  first: Array
  rows: Array
  origin: Array

  def inside(self, num_rows: int) -> Array:
    """bool `[num_rows, P * E]`: which row is of which segment."""
    row = iota(num_rows)[:, None]
    return (row >= self.first[None]) & (row < (self.first + self.rows)[None])


def received(route: Route, device: Array) -> Held:
  """Of this device; of `route.back()`: those that it has sent."""
  tables = route.put, jnp.minimum(route.size, route.copied), route.take
  return Held(*(table[:, device].reshape(-1) for table in tables))


def kept(x: Array, route: Route, device: Array) -> Array:
  """`x` of this receiver, zero outside of the segments."""
  inside = jnp.any(received(route, device).inside(x.shape[0]), axis=1)
  return jnp.where(inside[:, None], x, jnp.zeros_like(x))
