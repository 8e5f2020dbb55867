"""`grouped_matmul` on any backend: padded blocks and a batched matmul."""

import jax.numpy as jnp

from .. import padded
from ..packed import iota, take
from ..registry import accumulator


def forward(lhs_rd, rhs, starts, *, transpose_rhs):
  """Same values as cpu.forward."""
  blocks = padded.lay_out(starts, lhs_rd.shape[0])
  lhs = padded.into_blocks(lhs_rd, blocks.row, blocks)
  matrix = take(rhs, blocks.expert).astype(lhs.dtype)
  out = padded.matmul(lhs, matrix, (2, 2 if transpose_rhs else 1), accumulator(lhs_rd, rhs))
  kept = iota(lhs_rd.shape[0]) < starts[-1]
  return jnp.where(kept[:, None], padded.from_blocks(out.astype(lhs.dtype), blocks), 0)


def backward(lhs_rd, rhs, starts, dout_rf, *, transpose_rhs):
  """Gradients of `lhs` and `rhs`, the latter a sum over each expert's blocks."""
  blocks = padded.lay_out(starts, lhs_rd.shape[0])
  lhs, dout = (padded.into_blocks(x, blocks.row, blocks) for x in (lhs_rd, dout_rf))
  left, right = (dout, lhs) if transpose_rhs else (lhs, dout)
  products = padded.matmul(left, right, (1, 1), accumulator(lhs_rd, rhs))
  drhs = padded.sum_by_expert(products, blocks, rhs.shape[0]).astype(rhs.dtype)
  return forward(dout_rf, rhs, starts, transpose_rhs=not transpose_rhs), drhs
