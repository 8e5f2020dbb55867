"""Which rows each tile of a result holds: tiles of one expert's rows, which need be no multiple of anything.

A tile is made of a window of rows that begins at a multiple of 8, as the swizzled copies want, and writes only the
rows that are its own: nothing is padded, and no two tiles write one row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..packed import iota, take

Array = jax.Array

ALIGNED = 8  # rows of a swizzled atom: what a window may begin at
COLUMNS = 128  # of every tile
DEPTH = 32  # rows or columns that a stage contracts
STAGES = 3  # of which two blocks with their staging memory fit the 164 KiB of an A100, one the 100 KiB of Ada


class Tiles(NamedTuple):
  """Tiles of rows in ascending order, the tail past the last group in tiles of its own.

  Attributes:
    expert: int32 `[tiles]`, E for rows past the last group.
    low: int32 `[tiles]`, first row.
    high: int32 `[tiles]`, the row after the last.
    used: int32 `[1]`, how many there are.
  """

  expert: Array
  low: Array
  high: Array
  used: Array


def cut(starts: Array, num_rows: int, tile: int) -> Tiles:
  """The tiles of `num_rows` packed rows whose groups begin at `starts [E + 1]`."""
  bounds = jnp.append(starts, jnp.full_like(starts[:1], num_rows))
  first, end = bounds[:-1], bounds[1:]
  begin = window(first)
  count = jnp.where(end > first, (end - begin + tile - 1) // tile, 0)
  after = jnp.cumsum(count, dtype=jnp.int32)
  index = iota(room(num_rows, first.shape[0], tile))
  expert = jnp.searchsorted(after, index, side='right').astype(jnp.int32)
  expert = jnp.minimum(expert, first.shape[0] - 1)
  row = take(begin, expert) + (index - take(after - count, expert)) * tile
  low = jnp.maximum(row, take(first, expert))
  high = jnp.minimum(row + tile, take(end, expert))
  return Tiles(expert, low, high, after[-1:])


def room(num_rows: int, num_groups: int, tile: int) -> int:
  """The most tiles that so many rows in so many groups can have: each window may begin 7 rows early."""
  return (num_rows + min(num_groups, num_rows) * (tile + ALIGNED - 2)) // tile


def window(row):
  """The last multiple of 8 up to a row."""
  return row & -ALIGNED


def padded(x: Array, tile: int) -> Array:
  """`x` with as many rows as windows of `tile` rows may read, zeros after its own; mostly x itself."""
  rows = max(tile, -(-x.shape[0] // ALIGNED) * ALIGNED)
  return x if rows == x.shape[0] else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))
