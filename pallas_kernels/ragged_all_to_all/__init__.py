"""Ragged all-to-all: each device sends each other one a number of rows of its own."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import compat, registry
from ..packed import iota
from .reference import exchange as _reference

NAMES = ('reference', 'tpu')
# Rows of one copy; segments begin at its multiples, for a copy of a TPU begins at a whole tile of its memory.
CHUNK = 16


class _Static(NamedTuple):
  """What the compiled program depends on besides shapes."""

  axis_name: str
  num_out_rows: int
  implementation: str


class Segments(NamedTuple):
  """Where rows lie on this device, `[P]` each: the segments for, and those from, every device.

  Attributes:
    first: first row of a segment.
    size: its rows.
    chunks: how many copies of CHUNK rows it takes, of those that both devices have room for.
  """

  first: Array
  size: Array
  chunks: Array


def ragged_all_to_all(
  x: Float[Array, 'R D'],
  sizes: Int32[Array, 'P P'],
  *,
  axis_name: str,
  num_out_rows: int,
  implementation: str | None = None,
) -> Float[Array, 'R_out D']:
  """Inside `shard_map` over `axis_name` of P devices: segment d of device s becomes segment s of device d.

  The segments of `x` are those for device 0, 1, ...; each begins at the multiple of CHUNK after the end of the one
  before. So do the segments of the result, which are of device 0, 1, ... Rows between segments are zero, in value and
  in gradient. Rows for which there is no room, here or there, are lost: the caller must leave it.

  Nothing overlaps with it: the kernel ends when all rows have come, and a core that runs one kernel runs no other, so
  that the first matmul of the experts waits, also where tokens travel in several chunks. Hiding the transfer would
  take a matmul that waits for each segment by itself, in the same kernel, and that is not written. The exchanges of
  moejax take XLA's operation instead, whose transfers run beside kernels (moejax/moe/exchange/hop.py, `in_chunks`, has
  what the compiler makes of it).

  Args:
    x: rows to send.
    sizes: `sizes[s, d]` rows go from device s to device d; every device must hold the same table.
    axis_name: the mesh axis.
    num_out_rows: rows of the result.
    implementation: 'tpu' (copies from device to device), 'reference' (an all-gather), which None is everywhere.

  Raises:
    ValueError: an unknown implementation, or a table that is not int32 `[P, P]`.
    Unsupported: no floating type of 16 bits or more; for 'tpu' other rows than multiples of CHUNK, float16, float64.
  """
  registry.check_name('ragged_all_to_all', implementation, NAMES)
  registry.check_dtypes('ragged_all_to_all', x=x)
  devices = jax.lax.axis_size(axis_name)
  if sizes.shape != (devices, devices) or sizes.dtype != jnp.dtype('int32'):
    raise ValueError(f'sizes {sizes.dtype}{sizes.shape}, expected int32{(devices, devices)}')
  x, sizes = compat.vary_together(x, sizes)
  return _exchange(_Static(axis_name, num_out_rows, implementation or 'reference'), x, sizes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(static, x, sizes):
  if static.implementation == 'reference':
    return _reference(x, sizes, static.axis_name, static.num_out_rows, CHUNK)
  me = jax.lax.axis_index(static.axis_name)
  table = firsts(sizes), firsts(sizes.T).T
  room = [
    (n - first) // CHUNK for n, first in zip((x.shape[0], static.num_out_rows), table, strict=True)
  ]
  chunks = jnp.clip(-(-sizes // CHUNK), 0, jnp.maximum(jnp.minimum(*room), 0))
  sent = Segments(table[0][me], sizes[me], chunks[me])
  received = Segments(table[1][:, me], sizes[:, me], chunks[:, me])
  arguments = x, sent, received, table[1][me]
  out = registry.run(__name__, 'exchange', static.implementation, *arguments, static=static)
  return jnp.where(held(received, static.num_out_rows)[:, None], out, 0)


def _forward(static, x, sizes):
  return _exchange(static, x, sizes), (jnp.zeros((x.shape[0], 0), x.dtype), sizes)


def _backward(static, residuals, dout):
  """Every segment goes back where it came from."""
  like, sizes = residuals
  return _exchange(static._replace(num_out_rows=like.shape[0]), dout, sizes.T), None


_exchange.defvjp(_forward, _backward)


def firsts(sizes: Array) -> Array:
  """First row of each segment, along the last axis."""
  chunked = -(-sizes // CHUNK) * CHUNK
  return jnp.cumsum(chunked, axis=-1, dtype=jnp.int32) - chunked


def held(segments: Segments, num_rows: int) -> Array:
  """bool `[num_rows]`: which rows belong to a segment and were copied."""
  row = iota(num_rows)[:, None]
  end = segments.first + jnp.minimum(segments.size, segments.chunks * CHUNK)
  return jnp.any((row >= segments.first[None]) & (row < end[None]), axis=1)
