"""Grouped matmul: consecutive rows, each group times the matrix of its expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from .. import compat, registry
from .reference import grouped_matmul as _reference

NAMES = ('blocks', 'cpu', 'gpu', 'reference', 'tpu')


def grouped_matmul(
  lhs: Float[Array, 'R D'],
  rhs: Float[Array, 'E D_in D_out'],
  group_sizes: Int32[Array, 'E'],
  *,
  transpose_rhs: bool = False,
  implementation: str | None = None,
) -> Float[Array, 'R F']:
  """`out[r] = lhs[r] @ rhs[e]` for the expert e whose group holds row r.

  Sums are kept in float32 or wider; the result has the type of lhs. Rows past the last group are zero, in
  value and in gradient, whatever lhs holds there. R may be 0.

  Args:
    lhs: rows, the group of expert 0 first.
    rhs: `[E, D, F]`, or `[E, F, D]` with `transpose_rhs`.
    group_sizes: rows of each expert; their sum is at most R.
    transpose_rhs: multiply by `rhs[e].T`.
    implementation: 'cpu', 'gpu', 'tpu', 'blocks', 'reference', or None for the best of the platform lowered for.

  Raises:
    ValueError: an unknown implementation, axes or widths that do not belong together, group sizes that are not
      int32, or (where they are known) negative or more than R together.
    Unsupported: a type narrower than 16 bits, or no floating type; for 'tpu' see tpu.check, for 'gpu' gpu.forward.
  """
  registry.check_name('grouped_matmul', implementation, NAMES)
  registry.check_dtypes('grouped_matmul', lhs=lhs, rhs=rhs)
  check_axes(lhs, rhs, group_sizes)
  width = rhs.shape[2 if transpose_rhs else 1]
  if width != lhs.shape[1]:
    raise ValueError(f'rhs.shape={rhs.shape} with {transpose_rhs=} wants lhs.shape[1]={width}')
  if implementation == 'reference' or not lhs.shape[0]:  # of no rows there is nothing to compute
    return _reference(lhs, rhs, group_sizes, transpose_rhs=transpose_rhs)
  starts = starts_of(group_sizes, lhs.shape[0])
  return _grouped_matmul(transpose_rhs, implementation, *compat.vary_together(lhs, rhs, starts))


def starts_of(group_sizes, num_rows: int):
  """int32 `[E + 1]`: first row of each group, and the end of the last."""
  ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), num_rows)
  return jnp.concatenate([jnp.zeros_like(ends[:1]), ends])


def check_axes(lhs, rhs, group_sizes):
  """Refuses axes that do not belong together, and group sizes that are known to be wrong.

  Raises:
    ValueError: see `grouped_matmul`.
  """
  if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.shape != rhs.shape[:1]:
    shapes = f'lhs.shape={lhs.shape}, rhs.shape={rhs.shape}, group_sizes.shape={group_sizes.shape}'
    raise ValueError(f'{shapes}: expected [R, D], [E, D, F] and [E]')
  if group_sizes.dtype != jnp.dtype('int32'):
    raise ValueError(f'group_sizes.dtype={group_sizes.dtype}, expected int32')
  if not isinstance(group_sizes, jax.core.Tracer):
    sizes = np.asarray(group_sizes)
    if (sizes < 0).any() or sizes.sum(dtype=np.int64) > lhs.shape[0]:
      raise ValueError(
        f'group_sizes={sizes.tolist()}: none may be negative, nor all exceed R={lhs.shape[0]}'
      )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(transpose_rhs, implementation, lhs, rhs, starts):
  options = dict(transpose_rhs=transpose_rhs)
  return registry.run(__name__, 'forward', implementation, lhs, rhs, starts, **options)


def _forward(transpose_rhs, implementation, *args):
  return _grouped_matmul(transpose_rhs, implementation, *args), args


def _backward(transpose_rhs, implementation, residuals, dout):
  options = dict(transpose_rhs=transpose_rhs)
  dlhs, drhs = registry.run(__name__, 'backward', implementation, *residuals, dout, **options)
  return dlhs, drhs, None


_grouped_matmul.defvjp(_forward, _backward)
