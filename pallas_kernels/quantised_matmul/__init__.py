"""Grouped matmul with weights of eight bits, for inference: a step that reads few rows is as fast as its bytes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import compat, registry
from ..grouped_matmul import check_axes, starts_of
from .reference import quantised_matmul as _reference

NAMES = ('blocks', 'cpu', 'reference', 'tpu')


class Quantised(NamedTuple):
  """`values * scale`: a column of an expert's matrix has one scale.

  Attributes:
    values: int8 `[E, D, F]`.
    scale: float32 `[E, 1, F]`.
  """

  values: Array
  scale: Array


def quantise(rhs: Float[Array, 'E D F']) -> Quantised:
  """The nearest of 255 levels, symmetric about zero: the largest entry of a column is 127 times its scale.

  No entry moves by more than half a scale. A column of zeros, or of numbers whose scale would be no normal float32, has
  the scale 1, one with a NaN or infinity the scale NaN.
  """
  largest = jnp.max(jnp.abs(rhs.astype(jnp.float32)), axis=1, keepdims=True)
  scale = jnp.where(largest < 127 * jnp.finfo(jnp.float32).tiny, 1, largest / 127)
  scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
  levels = jnp.round(rhs.astype(jnp.float32) / scale)
  return Quantised(jnp.where(jnp.isnan(levels), 0, levels).astype(jnp.int8), scale)


def quantised_matmul(
  lhs: Float[Array, 'R D'],
  rhs: Quantised,
  group_sizes: Int32[Array, 'E'],
  *,
  implementation: str | None = None,
) -> Float[Array, 'R F']:
  """`out[r] = (lhs[r] @ values[e]) * scale[e]` for the expert e whose group holds row r.

  The values meet rows in the rows' type, in which every int8 is exact; sums are kept in float32 or wider. Rows past the
  last group are zero. It has no gradient.

  Raises:
    ValueError: an unknown implementation, shapes or types that do not belong together, bad group sizes.
    Unsupported: lhs of a type narrower than 16 bits, or no floating type; for 'tpu' see grouped_matmul; in a gradient.
  """
  registry.check_name('quantised_matmul', implementation, NAMES)
  registry.check_dtypes('quantised_matmul', lhs=lhs)
  check_axes(lhs, rhs.values, group_sizes)
  wanted = (rhs.values.shape[0], 1, rhs.values.shape[2])
  if rhs.values.dtype != jnp.dtype('int8') or rhs.scale.shape != wanted:
    found = f'{rhs.values.dtype} values, scale.shape={rhs.scale.shape}'
    raise ValueError(f'quantised_matmul: {found}, expected int8 and {wanted}')
  if implementation == 'reference':
    return _reference(lhs, *rhs, group_sizes)
  starts = starts_of(group_sizes, lhs.shape[0])
  return _quantised_matmul(implementation, *compat.vary_together(lhs, *rhs, starts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantised_matmul(implementation, lhs, values, scale, starts):
  return registry.run(__name__, 'forward', implementation, lhs, values, scale, starts)


def _refuse(implementation, *args):
  raise registry.Unsupported(
    'quantised_matmul has no gradient: train on the weights it was made of'
  )


_quantised_matmul.defvjp(_refuse, _refuse)
