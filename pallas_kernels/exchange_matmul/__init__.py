"""Matmuls of experts that live on other devices: the first begin before all rows have come, or end after some went.

`exchange_matmul` sends rows to their experts and multiplies them there, `matmul_exchange` multiplies them and sends the
results back. A layer of experts is one after the other, and either is the gradient of the other. On TPUs both are one
kernel, in which the products of an expert are made while rows of others travel. The ragged exchange of moejax takes
them where a config says so (`exchange_options={'kernel': 'tpu'}`).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import compat, registry, segments
from ..ragged_all_to_all import Static as Travel
from . import reference

NAMES = ('reference', 'tpu')


class _Static(NamedTuple):
  """What the compiled program depends on besides shapes; `num_rows` are those of the result."""

  axis_name: str
  num_rows: int
  transpose_rhs: bool
  implementation: str


def exchange_matmul(
  x: Float[Array, 'R D'],
  sizes: Int32[Array, 'P P _'],
  rhs: Sequence[Float[Array, 'E D_in D_out']],
  *,
  axis_name: str,
  num_out_rows: int,
  transpose_rhs: bool = False,
  implementation: str | None = None,
) -> tuple[Float[Array, 'R_out F'], ...]:
  """Inside `shard_map` over `axis_name` of P devices: rows travel to their experts, `out_i = row @ rhs_i[e]`.

  Segment (d, e) of x, for expert e of device d, are rows sorted by device and expert; each segment begins at the
  multiple of 16 rows after the end of the one before. In the results those of expert 0 come first, those of device 0
  before those of device 1, and again each begins at a multiple of 16. Rows between segments are zero, in value and in
  gradient, whatever x holds there. Rows for which there is no room, here or there, are lost: the caller must leave it.

  Sums are kept in float32 or wider; the results have the type of x.

  Args:
    x: rows to send.
    sizes: `sizes[s, d, e]` rows go from device s to expert e of device d; every device must hold the same table.
    rhs: one or more matrices `[E, D, F]` of this device's experts (gate and up, say), or `[E, F, D]` with
      `transpose_rhs`.
    axis_name: the mesh axis.
    num_out_rows: rows of the results.
    transpose_rhs: multiply by `rhs_i[e].T`.
    implementation: 'tpu' (one kernel), 'reference' (an all-gather and a `grouped_matmul`), which None is everywhere.

  Raises:
    ValueError: an unknown implementation, no matrices, or shapes or types that do not belong together.
    Unsupported: no floating type of 16 bits or more; for 'tpu' other rows than multiples of 16, float16, float64, or
      widths of which no tile fits.
  """
  static = _Static(axis_name, num_out_rows, transpose_rhs, implementation or 'reference')
  _check('exchange_matmul', implementation, (x,), sizes, rhs, static)
  x, sizes, *rhs = compat.vary_together(x, sizes, *rhs)
  route = segments.route(sizes, x.shape[0], num_out_rows)
  if static.implementation == 'reference':
    outs = reference.there(x, tuple(rhs), route, _travel(static), transpose_rhs)
  else:
    outs = _there(static, x, tuple(rhs), route)
  me = jax.lax.axis_index(axis_name)
  return tuple(segments.kept(out, route, me) for out in outs)


def matmul_exchange(
  lhs: Sequence[Float[Array, 'R D']],
  sizes: Int32[Array, 'P P _'],
  rhs: Sequence[Float[Array, 'E D_in D_out']],
  *,
  axis_name: str,
  num_out_rows: int,
  transpose_rhs: bool = False,
  implementation: str | None = None,
) -> Float[Array, 'R_out F']:
  """The way back: `sum_i lhs_i[r] @ rhs_i[e]` of every row, where the row was sent from by `exchange_matmul`.

  `lhs` lie as results of `exchange_matmul` do and `sizes` is the same table, from device s there to device d here; the
  result of `num_out_rows` rows lies as x does. All else is as there.
  """
  static = _Static(axis_name, num_out_rows, transpose_rhs, implementation or 'reference')
  _check('matmul_exchange', implementation, lhs, sizes, rhs, static)
  count = len(lhs)
  sizes, *arrays = compat.vary_together(sizes, *lhs, *rhs)
  route = segments.route(sizes, num_out_rows, lhs[0].shape[0])
  me = jax.lax.axis_index(axis_name)
  lhs, rhs = tuple(segments.kept(x, route, me) for x in arrays[:count]), tuple(arrays[count:])
  if static.implementation == 'reference':
    return reference.back(lhs, rhs, route, _travel(static), transpose_rhs)
  return segments.kept(_back(static, lhs, rhs, route), route.back(), me)


def _travel(static):
  return Travel(static.axis_name, static.num_rows, 'reference')


def _check(operation, implementation, lhs, sizes, rhs, static):
  registry.check_name(operation, implementation, NAMES)
  arrays = {f'lhs[{i}]': x for i, x in enumerate(lhs)} | {f'rhs[{i}]': w for i, w in enumerate(rhs)}
  registry.check_dtypes(operation, **arrays)
  devices = jax.lax.axis_size(static.axis_name)
  one = len(lhs) == 1 and operation == 'exchange_matmul'
  if not rhs or not (one or len(lhs) == len(rhs)):
    raise ValueError(f'{operation}: {len(lhs)} operands and {len(rhs)} matrices')
  wanted = (devices, devices, rhs[0].shape[0])
  if sizes.shape != wanted or sizes.dtype != jnp.dtype('int32'):
    raise ValueError(f'sizes {sizes.dtype}{sizes.shape}, expected int32{wanted}')
  shapes = {(str(x.dtype), x.shape) for x in lhs}, {(str(w.dtype), w.shape) for w in rhs}
  inner = rhs[0].shape[2 if static.transpose_rhs else 1]
  if any(len(s) > 1 for s in shapes) or lhs[0].shape[1] != inner:
    raise ValueError(
      f'{operation}: {[x.shape for x in lhs]} and {[w.shape for w in rhs]} with '
      f'transpose_rhs={static.transpose_rhs}; expected [R, D] and [E, D, F] of one type each'
    )


def _run(part, static, *args, **options):
  options = dict(axis_name=static.axis_name, **options)
  return registry.run(__name__, part, static.implementation, *args, **options)


def _turned(static, num_rows):
  """What of the gradient that goes the other way."""
  return dict(num_rows=num_rows, transpose_rhs=not static.transpose_rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _there(static, x, rhs, route):
  return _there_forward(static, x, rhs, route)[0]


def _there_forward(static, x, rhs, route):
  options = dict(num_rows=static.num_rows, transpose_rhs=static.transpose_rhs)
  received, *outs = _run('there', static, x, rhs, route, **options)
  return tuple(outs), (jnp.zeros((x.shape[0], 0), x.dtype), received, rhs, route)


def _there_backward(static, residuals, douts):
  like, received, rhs, route = residuals
  me = jax.lax.axis_index(static.axis_name)
  dx = _run('back', static, douts, rhs, route, **_turned(static, like.shape[0]))
  received = segments.kept(received, route, me)
  drhs = _matrices(static, not static.transpose_rhs, received, douts, route, rhs[0].dtype)
  return segments.kept(dx, route.back(), me), drhs, None


_there.defvjp(_there_forward, _there_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _back(static, lhs, rhs, route):
  options = dict(num_rows=static.num_rows, transpose_rhs=static.transpose_rhs)
  return _run('back', static, lhs, rhs, route, **options)


def _back_forward(static, lhs, rhs, route):
  return _back(static, lhs, rhs, route), (lhs, rhs, route)


def _back_backward(static, residuals, dout):
  lhs, rhs, route = residuals
  received, *dlhs = _run('there', static, dout, rhs, route, **_turned(static, lhs[0].shape[0]))
  received = segments.kept(received, route, jax.lax.axis_index(static.axis_name))
  drhs = _matrices(static, static.transpose_rhs, received, lhs, route, rhs[0].dtype)
  return tuple(dlhs), drhs, None


_back.defvjp(_back_forward, _back_backward)


def _matrices(static, one_left, one, many, route, dtype):
  """Gradients of the matrices: `one^T many_i`, or `many_i^T one`."""
  run = functools.partial(_run, 'sums', static)
  if one_left:
    return tuple(run(one, many, route, dtype=dtype))
  return tuple(run(x, (one,), route, dtype=dtype)[0] for x in many)
