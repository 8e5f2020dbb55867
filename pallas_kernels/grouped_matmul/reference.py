"""The definition of `grouped_matmul`: a dense loop over experts, differentiated by JAX."""

import jax
import jax.numpy as jnp

from ..packed import iota
from ..registry import accumulator


def grouped_matmul(lhs, rhs, group_sizes, *, transpose_rhs, group_offset=None):
  """Every expert's matrix on every row; see the contract in `__init__`."""
  acc = accumulator(lhs, rhs)
  end_e = jnp.cumsum(group_sizes, dtype=jnp.int32)
  start_e = end_e - group_sizes
  if group_offset is not None:
    part = lambda x: jax.lax.dynamic_slice_in_dim(x, group_offset, rhs.shape[0])
    start_e, end_e = part(start_e), part(end_e)
  position_r = iota(lhs.shape[0])
  out = jnp.zeros((lhs.shape[0], rhs.shape[1 if transpose_rhs else 2]), acc)
  for e in range(rhs.shape[0]):
    chosen = (position_r >= start_e[e]) & (position_r < end_e[e])
    matrix = rhs[e].T if transpose_rhs else rhs[e]
    # Masked on both sides of the product: a NaN of another row, or of its gradient, times zero is a NaN.
    rows = jnp.where(chosen[:, None], lhs.astype(acc), 0)
    out = out + jnp.where(chosen[:, None], rows @ matrix.astype(acc), 0)
  return out.astype(lhs.dtype)
