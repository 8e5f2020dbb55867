"""Visits: the pairs (tile of rows, group) that overlap, in the order in which a grouped matmul makes them.

Groups lie one after the other in packed rows, so a tile that holds the end of one group and the start of the next is
visited twice. Both indices ascend, which lets a grid's pipeline keep an expert's weights, and a tile of the result, on
the chip while they do not change.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .packed import iota, take

Array = jax.Array


class Visits(NamedTuple):
  """Room for `tiles + E` visits, of which the first `used` are made; the others repeat the last one.

  Attributes:
    tile: int32 `[V]`.
    group: int32 `[V]`; E means rows that are past the last group.
    starts: int32 `[E + 2]`, first row of each group, of the rows past the last, and the number of rows.
    used: int32 `[1]`.
  """

  tile: Array
  group: Array
  starts: Array
  used: Array


def visit(starts: Array, num_rows: int, tile: int, *, tail: bool = False, empty: bool = False):
  """The visits to packed rows whose groups begin at `starts [E + 1]`.

  Args:
    starts: first row of each group, and the end of the last.
    num_rows: R, at least 1.
    tile: rows of a tile.
    tail: visit the rows past the last group too.
    empty: visit empty groups once.
  """
  num_groups, tiles = starts.shape[0] - 1, -(-num_rows // tile)
  starts = jnp.append(starts, jnp.full_like(starts[:1], num_rows))
  first, end = starts[:-1], starts[1:]
  count = jnp.where(end > first, (end - 1) // tile - first // tile + 1, int(empty))
  count = jnp.where((iota(num_groups + 1) == num_groups) & (not tail or first == end), 0, count)
  after = jnp.cumsum(count, dtype=jnp.int32)
  used = after[-1:]
  step = jnp.minimum(iota(tiles + num_groups), jnp.maximum(used - 1, 0))
  group = jnp.searchsorted(after, step, side='right').astype(jnp.int32)
  group = jnp.minimum(group, num_groups)
  index = step - take(after - count, group)
  return Visits(jnp.minimum(take(first, group) // tile + index, tiles - 1), group, starts, used)
