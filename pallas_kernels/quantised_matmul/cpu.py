"""`quantised_matmul` for CPUs: an expert's values are widened when it is visited."""

import jax.numpy as jnp

from ..grouped_matmul import cpu
from ..packed import iota, take
from ..registry import accumulator


def forward(lhs_rd, values, scale, starts):
  """`[R, F]`; `starts [E + 1]` are the first rows of the groups and the end of the last."""
  acc = accumulator(lhs_rd)
  out = cpu.forward(lhs_rd.astype(acc), values, starts, transpose_rhs=False)
  return (out * scale_of_rows(scale, starts, lhs_rd.shape[0]).astype(acc)).astype(lhs_rd.dtype)


def scale_of_rows(scale, starts, num_rows):
  """`[R, F]`: the scale of each row's expert, zero for rows past the last group."""
  row = iota(num_rows)
  expert = jnp.searchsorted(starts[1:], row, side='right').astype(jnp.int32)
  of_row = take(scale[:, 0], jnp.minimum(expert, scale.shape[0] - 1))
  return jnp.where(row[:, None] < starts[-1], of_row, 0)
