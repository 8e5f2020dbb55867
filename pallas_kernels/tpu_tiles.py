"""Which tiles a grouped matmul takes on a TPU: a function of the shapes alone.

All tiles that fit in on-chip memory are priced: the larger of arithmetic and traffic, and a fixed cost a step. The
prices stand for the chips from v5p to 7x (an arithmetic intensity between v5p's 166 and v6e's 560 FLOPs a byte; v5p's
two cores share the tiles of one axis) and have not been fitted to measurements.
"""

import functools
from typing import NamedTuple

from .registry import Unsupported

# Bytes that the blocks of one step may take, of 64 MiB or more; the compiler needs some for itself.
BUDGET = 40 * 2**20
LIMIT = 60 * 2**20
# At the boundary of two groups only these rows of a tile are computed.
PART = 128
# Multiplications of one step: the compiler writes them all out.
STEP_WORK = {2: 2**30, 4: 2**27}
INTENSITY = 400  # FLOPs in the time of one byte
# A matrix is loaded into the matmul unit in the time of this many rows, half of it hidden.
LOAD = 64
STEP = 2e8  # FLOPs in the time that one grid step costs by itself


class Tiles(NamedTuple):
  """Rows, contracted and resulting columns of one step."""

  rows: int
  inner: int
  columns: int


def divisors(width: int) -> tuple[int, ...]:
  """Parts into which an axis may be cut, widest first: multiples of 128 that divide it, and itself."""
  return (
    width,
    *(part for part in range(width - width % 128, 0, -128) if width % part == 0 and part < width),
  )


def row_tiles(num_rows: int) -> tuple[int, ...]:
  """Heights of a tile; rows that are fewer than a part are one tile."""
  return tuple(rows for rows in (128, 256, 512, 1024) if rows <= num_rows) or (num_rows,)


@functools.cache
def for_rows(
  num_rows, num_groups, inner, columns, itemsize, *, lhs=1, rhs=1, sums=1, outs=1, whole=False
) -> Tiles:
  """Tiles of `out [R, columns] = rows [R, inner] @ matrix [inner, columns]`.

  Args:
    num_rows, num_groups, inner, columns: the shapes.
    itemsize: bytes of an element.
    lhs, rhs: how many row operands and matrices a step reads.
    sums: how many accumulators it keeps.
    outs: how many blocks `[rows, columns]` it reads or writes besides.
    whole: contract all of `inner` in one step.

  Raises:
    Unsupported: nothing fits.
  """

  def memory(t):
    once = t.rows * t.columns * 4 * sums * (2 if t.inner < inner else 1)
    twice = lhs * t.rows * t.inner + outs * t.rows * t.columns
    return once + itemsize * (2 * twice + 3 * rhs * t.inner * t.columns)

  def price(t):
    # A matrix stays where it is from tile to tile of its group if it comes whole.
    visits = -(-num_rows // t.rows) + num_groups
    loads = num_groups if t.inner == inner else visits
    traffic = lhs * num_rows * inner * (columns // t.columns) + rhs * loads * inner * columns
    work = _work(num_rows, num_groups, t, columns // t.columns) * inner * columns * max(lhs, rhs)
    steps = visits * (inner // t.inner) * (columns // t.columns)
    return max(work, INTENSITY * itemsize * traffic) + STEP * steps

  parts = (inner,) if whole else divisors(inner)
  return _cheapest(memory, price, num_rows, parts, columns, STEP_WORK[itemsize])


@functools.cache
def for_groups(num_rows, num_groups, left, right, itemsize, *, rhs=1) -> Tiles:
  """Tiles of `out [E, left, right]`, sums over each group's rows of `left^T right`; `inner` cuts `left`.

  Raises:
    Unsupported: nothing fits.
  """

  def memory(t):
    result = t.inner * t.columns * rhs
    return 2 * itemsize * (t.rows * t.inner + rhs * t.rows * t.columns + result) + 4 * result

  def price(t):
    visits = -(-num_rows // t.rows) + num_groups
    across, down = right // t.columns, left // t.inner
    traffic = num_rows * (left * across + rhs * right * down) + rhs * num_groups * left * right
    work = _work(num_rows, num_groups, t, across * down) * left * right * rhs
    return max(work, INTENSITY * itemsize * traffic) + STEP * visits * across * down

  return _cheapest(memory, price, num_rows, divisors(left), right, STEP_WORK[itemsize])


def _work(num_rows, num_groups, tiles, shares):
  """FLOPs for one inner and one column, as if nothing of it were lost; `shares` are what two cores divide."""
  rows = num_rows + num_groups * min(tiles.rows, PART)
  return 2 * rows * (1 + LOAD / tiles.rows) * (shares + shares % 2) / shares


def _cheapest(memory, price, num_rows, inner, columns, work):
  every = [
    Tiles(rows, i, c) for rows in row_tiles(num_rows) for i in inner for c in divisors(columns)
  ]
  fitting = [t for t in every if memory(t) <= BUDGET and t.rows * t.inner * t.columns <= work]
  if not fitting:
    raise Unsupported(
      f'TPU: no tile of {num_rows} rows, {inner[0]} and {columns} columns fits in {BUDGET} bytes and {work} products'
    )
  return min(fitting, key=price)
