"""`grouped_matmul` for NVIDIA Ampere and Ada: a block a tile, on packed rows as they lie."""

import jax.numpy as jnp

from ..ampere import machine, rows
from ..hopper import tiles


def forward(lhs_rd, rhs, starts, *, transpose_rhs):
  """Same values as cpu.forward.

  Raises:
    Unsupported: jax before 0.11, types other than one 16-bit type (rhs may be float32), widths that are no
      multiples of 128.
  """
  aim = _check(lhs_rd, rhs)
  tile = tiles.rows_per_tile(lhs_rd.shape[0], rhs.shape[0])
  matrices = rhs.astype(lhs_rd.dtype)
  return rows.products(aim, lhs_rd, matrices, starts, tile, transposed=transpose_rhs)


def backward(lhs_rd, rhs, starts, dout_rf, *, transpose_rhs):
  """Gradients of `lhs` and `rhs`; the latter is summed in float32 and rounded once."""
  aim = _check(lhs_rd, rhs)
  left, right = (dout_rf, lhs_rd) if transpose_rhs else (lhs_rd, dout_rf)
  drhs = rows.sums(aim, left, right, starts, jnp.dtype(rhs.dtype))
  return forward(dout_rf, rhs, starts, transpose_rhs=not transpose_rhs), drhs


def _check(lhs_rd, rhs) -> machine.Hardware:
  tiles.check_types('grouped_matmul', lhs_rd, body='ampere', rhs=rhs)
  widths = {'rhs.shape[1]': rhs.shape[1], 'rhs.shape[2]': rhs.shape[2]}
  tiles.check_widths('grouped_matmul', body='ampere', **widths)
  return machine.current('grouped_matmul')
