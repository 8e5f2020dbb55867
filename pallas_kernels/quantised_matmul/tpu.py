"""`quantised_matmul` for TPUs: eight bits travel to the chip, where they are widened; scales in the epilogue."""

import jax

from .. import tpu_tiles
from ..grouped_matmul.tpu import check
from ..tpu_matmul import Rows, matmul
from ..visits import visit


def forward(lhs_rd, values, scale, starts):
  """Same values as cpu.forward."""
  check(lhs_rd, scale)
  num_rows, (num_groups, inner, columns) = lhs_rd.shape[0], values.shape
  # The widened values of a step are as large as those of grouped_matmul.
  tiles = tpu_tiles.for_rows(num_rows, num_groups, inner, columns, lhs_rd.dtype.itemsize)
  return matmul(
    [Rows(lhs_rd)],
    [values],
    visit(starts, num_rows, tiles.rows, tail=True),
    tiles,
    per_group=[scale],
    outs=[Rows(jax.ShapeDtypeStruct((num_rows, columns), lhs_rd.dtype))],
    epilogue=lambda sums, extras: [sums[0] * extras[0]],
    name='quantised_matmul',
  )[0]
