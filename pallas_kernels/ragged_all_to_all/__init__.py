"""Ragged all-to-all: each device sends each other one a number of rows of its own."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import compat, registry, segments
from ..segments import CHUNK as CHUNK
from .reference import exchange as _reference

NAMES = ('reference', 'tpu')


class Static(NamedTuple):
  """What the compiled program depends on besides shapes."""

  axis_name: str
  num_out_rows: int
  implementation: str


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
  that the first matmul of the experts waits, also where tokens travel in several chunks. `exchange_matmul` has both in
  one kernel, which waits for the rows of each expert by themselves. The exchanges of moejax take XLA's operation, whose
  transfers run beside kernels (moejax/moe/exchange/hop.py, `in_chunks`, has what the compiler makes of it).

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
  static = Static(axis_name, num_out_rows, implementation or 'reference')
  return move(static, x, segments.route(sizes[:, :, None], x.shape[0], num_out_rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def move(static, x, route):
  """The rows of a `segments.Route`, zeros between them."""
  if static.implementation == 'reference':
    return _reference(x, route, static.axis_name, static.num_out_rows)
  out = registry.run(__name__, 'exchange', static.implementation, x, route, static=static)
  return segments.kept(out, route, jax.lax.axis_index(static.axis_name))


def _forward(static, x, route):
  return move(static, x, route), (jnp.zeros((x.shape[0], 0), x.dtype), route)


def _backward(static, residuals, dout):
  """Every segment goes back where it came from."""
  like, route = residuals
  return move(static._replace(num_out_rows=like.shape[0]), dout, route.back()), None


move.defvjp(_forward, _backward)
