"""The way out of the registers: chunks of 64 rows through shared memory, so that bulk copies write whole sectors."""

import jax.numpy as jnp

from .compat import pl, plgpu
from .ring import CONSUMERS, transforms

SLOTS = 2
LINE = 128  # bytes of a chunk's row: one swizzle atom


def chunk_width(dtype) -> int:
  """Columns of a chunk."""
  return LINE // jnp.dtype(dtype).itemsize


def scratch(dtype):
  """Two chunks for each consuming warpgroup."""
  width = chunk_width(dtype)
  return plgpu.SMEM((CONSUMERS, SLOTS, 64, width), dtype, transforms=transforms(dtype, width))


class Writer:
  """Writes chunks of one tile, alternating between two slots."""

  def __init__(self, chunks, wg):
    self.chunks, self.wg, self.written = chunks, wg, 0
    self.width = chunks.shape[-1]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  def write(self, values, target):
    """Starts the copy of `values [64, width]` to `target`, a slice of global memory."""
    slot = self.chunks.at[self.wg, self.written % SLOTS]
    if self.written >= SLOTS:
      plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
    slot[...] = values.astype(self.chunks.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(slot, target)
    self.written += 1

  def write_all(self, values, target, row, column):
    """Writes `values [64, n * width]` to `target` from that row and column on."""
    for first in range(0, values.shape[1], self.width):
      box = target.at[pl.ds(row, 64), pl.ds(column + first, self.width)]
      self.write(values[:, first : first + self.width], box)
