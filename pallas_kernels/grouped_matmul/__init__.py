"""Grouped matmul: consecutive rows, each group times the matrix of its expert."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from .. import compat, registry
from ..packed import iota
from .reference import grouped_matmul as _reference

NAMES = ('ampere', 'blocks', 'cpu', 'gpu', 'reference', 'tpu')


def grouped_matmul(
  lhs: Float[Array, 'R D'],
  rhs: Float[Array, 'E D_in D_out'],
  group_sizes: Int32[Array, 'G'],
  *,
  transpose_rhs: bool = False,
  group_offset: Int[Array, ''] | int | None = None,
  implementation: str | None = None,
) -> Float[Array, 'R F']:
  """`out[r] = lhs[r] @ rhs[e]` for the expert e whose group holds row r.

  Sums are kept in float32 or wider; the result has the type of lhs. Rows past the last group are zero, in
  value and in gradient, whatever lhs holds there. R may be 0.

  Args:
    lhs: rows, the group of expert 0 first.
    rhs: `[E, D, F]`, or `[E, F, D]` with `transpose_rhs`.
    group_sizes: rows of each expert; their sum is at most R. As many as matrices without `group_offset`.
    transpose_rhs: multiply by `rhs[e].T`.
    group_offset: the expert of `rhs[0]`, where a device holds E matrices of G experts; at most G - E (a traced one
      beyond counts as G - E). Rows of the other experts are zero, in value and in gradient, whatever lhs holds there.
    implementation: one of `NAMES`, or None for the best of the platform lowered for.

  Raises:
    ValueError: an unknown implementation, axes or widths that do not belong together, group sizes that are not
      int32, or (where they are known) negative or more than R together, a group offset that is no integer or (where
      it is known) leaves a matrix without a group.
    Unsupported: a type narrower than 16 bits, or no floating type; for 'tpu' see tpu.check, for 'gpu' gpu.forward, for
      'ampere' ampere.forward.
  """
  registry.check_name('grouped_matmul', implementation, NAMES)
  registry.check_dtypes('grouped_matmul', lhs=lhs, rhs=rhs)
  check_axes(lhs, rhs, group_sizes, group_offset)
  width = rhs.shape[2 if transpose_rhs else 1]
  if width != lhs.shape[1]:
    raise ValueError(f'rhs.shape={rhs.shape} with {transpose_rhs=} wants lhs.shape[1]={width}')
  if implementation == 'reference' or not lhs.shape[0]:  # of no rows there is nothing to compute
    options = dict(transpose_rhs=transpose_rhs, group_offset=group_offset)
    return _reference(lhs, rhs, group_sizes, **options)
  starts = starts_of(group_sizes, lhs.shape[0])
  if group_offset is None:
    return _grouped_matmul(transpose_rhs, implementation, *compat.vary_together(lhs, rhs, starts))
  starts = jax.lax.dynamic_slice_in_dim(starts, group_offset, rhs.shape[0] + 1)
  # bodies make zeros of the rows past the last group, not of those before the first
  after = (iota(lhs.shape[0]) >= starts[0])[:, None]
  arrays = compat.vary_together(jnp.where(after, lhs, 0), rhs, starts)
  return jnp.where(after, _grouped_matmul(transpose_rhs, implementation, *arrays), 0)


def starts_of(group_sizes, num_rows: int):
  """int32 `[E + 1]`: first row of each group, and the end of the last."""
  ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), num_rows)
  return jnp.concatenate([jnp.zeros_like(ends[:1]), ends])


def check_axes(lhs, rhs, group_sizes, group_offset=None):
  """Refuses axes that do not belong together, and group sizes that are known to be wrong.

  Raises:
    ValueError: see `grouped_matmul`.
  """
  some = group_offset is not None
  groups = group_sizes.shape[:1] if some and group_sizes.shape >= rhs.shape[:1] else rhs.shape[:1]
  if lhs.ndim != 2 or rhs.ndim != 3 or group_sizes.shape != groups:
    shapes = f'lhs.shape={lhs.shape}, rhs.shape={rhs.shape}, group_sizes.shape={group_sizes.shape}'
    raise ValueError(
      f'{shapes}: expected [R, D], [E, D, F] and {"[G] of E groups or more" if some else "[E]"}'
    )
  if some:
    _check_offset(group_offset, group_sizes.shape[0] - rhs.shape[0])
  if group_sizes.dtype != jnp.dtype('int32'):
    raise ValueError(f'group_sizes.dtype={group_sizes.dtype}, expected int32')
  if not isinstance(group_sizes, jax.core.Tracer):
    sizes = np.asarray(group_sizes)
    if (sizes < 0).any() or sizes.sum(dtype=np.int64) > lhs.shape[0]:
      raise ValueError(
        f'group_sizes={sizes.tolist()}: none may be negative, nor all exceed R={lhs.shape[0]}'
      )


def _check_offset(group_offset, most):
  traced = isinstance(group_offset, jax.core.Tracer)
  if jnp.ndim(group_offset) or not jnp.issubdtype(jnp.result_type(group_offset), jnp.integer):
    raise ValueError(f'group_offset={group_offset}: expected one integer')
  if not traced and not 0 <= int(group_offset) <= most:
    raise ValueError(
      f'group_offset={int(group_offset)}: expected 0 to {most}, so that every matrix has a group'
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
