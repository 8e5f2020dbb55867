"""Grouped matmul with weights of eight bits, for inference: a step that reads few rows is as fast as its bytes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import compat, registry
from ..grouped_matmul import check_axes, starts_of
from .reference import quantised_matmul as _reference

NAMES = ('blocks', 'cpu', 'gpu', 'reference', 'tpu')
# Types of the values, and the largest of each.
LARGEST = {'int8': 127.0, 'float8_e4m3fn': 448.0}


class Quantised(NamedTuple):
  """`values * scale`: a column of an expert's matrix has one scale.

  Attributes:
    values: int8 or float8_e4m3fn `[E, D, F]`.
    scale: float32 `[E, 1, F]`.
  """

  values: Array
  scale: Array


def quantise(rhs: Float[Array, 'E D F'], dtype: str = 'int8') -> Quantised:
  """The nearest values of eight bits, symmetric about zero: the largest entry of a column is the largest value.

  'int8' has 255 levels: no entry moves by more than half a scale. 'float8_e4m3fn' (4 bits of exponent, 3 of mantissa,
  no infinity; arXiv 2209.05433) moves none by more than a sixteenth of itself, or 2^-10 of a scale if that is more.
  A column of zeros, or of numbers whose scale would be no normal float32, has the scale 1, one with a NaN or infinity
  the scale NaN.

  Raises:
    ValueError: another `dtype`.
  """
  if dtype not in LARGEST:
    raise ValueError(f'{dtype=}: accepted are {", ".join(LARGEST)}')
  most = LARGEST[dtype]
  largest = jnp.max(jnp.abs(rhs.astype(jnp.float32)), axis=1, keepdims=True)
  scale = jnp.where(largest < most * jnp.finfo(jnp.float32).tiny, 1, largest / most)
  scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan)
  levels = rhs.astype(jnp.float32) / scale
  levels = jnp.where(jnp.isnan(levels), 0, levels)
  return Quantised((jnp.round(levels) if dtype == 'int8' else levels).astype(dtype), scale)


def quantised_matmul(
  lhs: Float[Array, 'R D'],
  rhs: Quantised,
  group_sizes: Int32[Array, 'E'],
  *,
  implementation: str | None = None,
) -> Float[Array, 'R F']:
  """`out[r] = (lhs[r] @ values[e]) * scale[e]` for the expert e whose group holds row r.

  The values meet rows in the rows' type, in which each is exact; sums are kept in float32 or wider. Rows past the
  last group are zero. It has no gradient.

  Raises:
    ValueError: an unknown implementation, shapes or types that do not belong together, bad group sizes.
    Unsupported: lhs of a type narrower than 16 bits, or no floating type; for 'tpu' see grouped_matmul, for 'gpu'
      gpu.forward; in a gradient.
  """
  registry.check_name('quantised_matmul', implementation, NAMES)
  registry.check_dtypes('quantised_matmul', lhs=lhs)
  check_axes(lhs, rhs.values, group_sizes)
  wanted = (rhs.values.shape[0], 1, rhs.values.shape[2])
  if str(rhs.values.dtype) not in LARGEST or rhs.scale.shape != wanted:
    found = f'{rhs.values.dtype} values, scale.shape={rhs.scale.shape}'
    raise ValueError(f'quantised_matmul: {found}, expected {" or ".join(LARGEST)} and {wanted}')
  if implementation == 'reference' or not lhs.shape[0]:
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
