"""Steps of a kernel that goes from expert to expert: tiles of an expert's rows, for each of its tiles of columns."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..packed import iota, take
from ..tpu_weights import Blocks

Array = jax.Array


class Steps(NamedTuple):
  """Room for all steps that there can be, of which the first `used` are made; the others repeat the last one.

  Attributes:
    group: int32 `[V]`, ascending.
    column: int32 `[V]`, tile of columns, ascending for each group.
    first: int32 `[V]`, first row.
    rows: int32 `[V]`, at most a tile's.
    used: int32 `[1]`.
  """

  group: Array
  column: Array
  first: Array
  rows: Array
  used: Array


def steps(first_e: Array, rows_e: Array, num_rows: int, tile: int, columns: int):
  """`(Steps, Blocks)` of groups that lie in `num_rows` rows, and of their matrices in so many tiles of columns.

  Every block of a matrix is read once, for the rows of a group are gone through for each; empty groups have no step.
  """
  num_groups = first_e.shape[0]
  tiles_e = -(-rows_e // tile)
  after = jnp.cumsum(tiles_e * columns, dtype=jnp.int32)
  used = after[-1:]
  step = jnp.minimum(iota(columns * (num_rows // tile + num_groups)), jnp.maximum(used - 1, 0))
  group = jnp.searchsorted(after, step, side='right').astype(jnp.int32)
  group = jnp.minimum(group, num_groups - 1)
  tiles = jnp.maximum(take(tiles_e, group), 1)
  index = step - take(after - tiles_e * columns, group)
  column, down = index // tiles, index % tiles * tile
  rows = jnp.clip(take(rows_e, group) - down, 0, tile)
  seen = jnp.cumsum(jnp.minimum(rows_e, 1), dtype=jnp.int32)
  order = jnp.searchsorted(seen, iota(num_groups), side='right').astype(jnp.int32)
  blocks = Blocks(
    turn=(take(seen, group) - 1) * columns + column,
    order=jnp.minimum(order, num_groups - 1),
    total=seen[-1:] * columns,
  )
  return Steps(group, column, take(first_e, group) + down, rows, used), blocks
