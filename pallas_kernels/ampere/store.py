"""The way out of the registers: chunks of rows through shared memory, so that threads write 16 bytes of a row."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .machine import Hardware
from .tiles import COLUMNS

BYTES = 16 * 1024  # of a chunk
SPREAD = 8  # columns after each row, which spread the rows over the banks


def scratch(dtype):
  """A chunk: 64 rows of a 16-bit type, 32 of float32."""
  rows = BYTES // (COLUMNS * jnp.dtype(dtype).itemsize)
  return plgpu.SMEM((rows, COLUMNS + SPREAD), dtype)


def write(machine: Hardware, chunk, acc, out, row, column, inside=None):
  """Writes a tile of sums to `out` from that row and column on.

  `inside`: (first, end) of the tile's rows to write, row `first` of the tile being row `row` of `out`; None: all.
  """
  columns, rows = pl.ds(column, COLUMNS), chunk.shape[0]
  for top in range(0, acc.shape[0], rows):
    chunk.at[:, pl.ds(0, COLUMNS)][...] = acc[top : top + rows].astype(chunk.dtype)
    if inside is None:
      values = machine.rows(chunk.at[:, pl.ds(0, COLUMNS)])
      out[pl.ds(row + top, rows), columns] = values
      continue
    first, end = (jnp.minimum(jnp.maximum(edge - top, 0), rows) for edge in inside)
    _write_some(machine, chunk, first, end - first, out, row + top + first - inside[0], columns)


def _write_some(machine, chunk, first, count, out, row, columns):
  """Powers of two down to 16 rows, then one by one."""
  for size in (64, 32, 16):

    @pl.when(count & size != 0)
    def _(size=size):
      done = count - jax.lax.rem(count, jnp.int32(2 * size))
      part = chunk.at[pl.ds(first + done, size), pl.ds(0, COLUMNS)]
      out[pl.ds(row + done, size), columns] = machine.rows(part)

  @pl.loop(count - jax.lax.rem(count, jnp.int32(16)), count)
  def _(r):
    out[row + r, columns] = chunk[first + r, pl.ds(0, COLUMNS)]
