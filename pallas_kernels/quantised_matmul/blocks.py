"""`quantised_matmul` on any backend: padded blocks of rows."""

import jax.numpy as jnp

from .. import padded
from ..packed import iota, take
from ..registry import accumulator
from .cpu import scale_of_rows


def forward(lhs_rd, values, scale, starts):
  """Same values as cpu.forward."""
  acc = accumulator(lhs_rd)
  blocks = padded.lay_out(starts, lhs_rd.shape[0])
  lhs = padded.into_blocks(lhs_rd, blocks.row, blocks)
  out = padded.matmul(lhs, take(values, blocks.expert).astype(lhs.dtype), (2, 1), acc)
  out = padded.from_blocks(out, blocks) * scale_of_rows(scale, starts, lhs_rd.shape[0]).astype(acc)
  kept = iota(lhs_rd.shape[0]) < starts[-1]
  return jnp.where(kept[:, None], out, 0).astype(lhs_rd.dtype)
