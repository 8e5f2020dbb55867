"""Rows of groups laid out so that each tile of rows belongs to one expert: the tail of a group's last tile is padding.

Tile quantisation costs the same products whether tiles are padded or masked; padding leaves no masks, no two tiles
that store to one row, and row starts that a bulk copy can be told are aligned.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..packed import iota, take

Array = jax.Array

DEPTH = 64  # rows or columns that one stage of a kernel contracts: 128 bytes of a 16-bit type


class Layout(NamedTuple):
  """Where the rows are, for tiles of `tile` rows.

  Attributes:
    expert: int32 `[tiles]`, ascending; unused tiles name the last expert.
    used: int32 `[1]`, tiles that hold rows.
    row: int32 `[tiles * tile]`, packed position of each padded row, -1 for padding and for unused tiles.
    slot: int32 `[R]`, padded row of each packed row; any place for rows past the last group.
    first: int32 `[E]`, first padded row of each expert.
    steps: int32 `[E]`, DEPTHs of rows that hold all rows of an expert.
  """

  expert: Array
  used: Array
  row: Array
  slot: Array
  first: Array
  steps: Array

  @property
  def tile(self) -> int:
    return self.row.shape[0] // self.expert.shape[0]


def padded_rows(num_rows: int, num_experts: int, tile: int) -> int:
  """Rows of the layout: each expert that has any may leave a part of one tile empty."""
  return (num_rows // tile + min(num_experts, num_rows)) * tile


def lay_out(starts: Array, num_rows: int, tile: int) -> Layout:
  """The layout of packed rows whose groups begin at `starts [E + 1]`."""
  num_experts = starts.shape[0] - 1
  count_e = starts[1:] - starts[:-1]
  after_e = jnp.cumsum((count_e + tile - 1) // tile, dtype=jnp.int32)
  first_e = (after_e - (count_e + tile - 1) // tile) * tile

  index = iota(padded_rows(num_rows, num_experts, tile) // tile)
  expert = jnp.minimum(_interval(after_e, index), num_experts - 1)
  offset = (index * tile - take(first_e, expert))[:, None] + iota(tile)[None, :]
  inside = (offset < take(count_e, expert)[:, None]) & (index < after_e[-1])[:, None]
  row = jnp.where(inside, take(starts, expert)[:, None] + offset, -1).reshape(-1)

  packed_r = iota(num_rows)
  expert_r = jnp.minimum(_interval(starts[1:], packed_r), num_experts - 1)
  slot_r = take(first_e, expert_r) + packed_r - take(starts, expert_r)
  slot_r = jnp.clip(slot_r, 0, row.shape[0] - 1)
  return Layout(expert, after_e[-1:], row, slot_r, first_e, (count_e + DEPTH - 1) // DEPTH)


def _interval(ends: Array, values: Array) -> Array:
  """Index of the half-open interval that each value lies in, given the intervals' ends.

  Every value meets every end in one fusion: a bisection is a loop of launches that a decoding step would wait for.
  """
  return jnp.searchsorted(ends, values, side='right', method='compare_all').astype(jnp.int32)


def spread(x: Array, index: Array) -> Array:
  """`x[index]`, zero where the index is -1."""
  inside = (index >= 0).reshape(-1, *(1,) * (x.ndim - 1))
  return jnp.where(inside, take(x, jnp.maximum(index, 0)), jnp.zeros((), x.dtype))


def collect(values: Array, layout: Layout, kept: Array) -> Array:
  """Packed rows `[R, ...]` of padded ones; zero from row `kept` on."""
  num_rows = layout.slot.shape[0]
  inside = (iota(num_rows) < kept).reshape(-1, *(1,) * (values.ndim - 1))
  return jnp.where(inside, take(values, layout.slot), jnp.zeros((), values.dtype))
