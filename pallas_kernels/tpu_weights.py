"""Matrices of a grouped matmul on their way to a TPU core: three buffers each, filled by the kernel itself.

The grid's own pipeline has two buffers and looks one step ahead, so that a matrix would be fetched during the last
visit of the group before, often a few rows at a boundary, and the core would wait. Here a block is asked for when the
one two before it is taken up, however many steps lie between (the structure of tokamax's gmm_v2, weights in
`pl.Buffered(3)`). What is left to wait for is the first block of each tile of columns.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .packed import iota, take
from .visits import Visits

Array = jax.Array
BUFFERS = 3


class Blocks(NamedTuple):
  """In which order the blocks of a matrix are read for one tile of columns.

  Attributes:
    turn: int32 `[V]`, of each visit, how many other groups have been visited before.
    order: int32 `[E]`, the groups that are visited, ascending; then any.
    total: int32 `[1]`, blocks in all.
  """

  turn: Array
  order: Array
  total: Array


def blocks_of(visits: Visits, steps: int) -> Blocks:
  """Of matrices that come whole (`steps` 1), one block a visited group; else `steps` blocks a visit."""
  num_groups = visits.starts.shape[0] - 2
  made = iota(visits.group.shape[0]) < visits.used
  of_group = jnp.where(made & (visits.group < num_groups), 1, 0)
  rows = jnp.zeros(num_groups + 1, jnp.int32).at[visits.group].add(of_group)[:-1]
  seen = jnp.cumsum(jnp.minimum(rows, 1), dtype=jnp.int32)
  turn = take(seen, jnp.minimum(visits.group, num_groups - 1)) - 1
  order = jnp.searchsorted(seen, iota(num_groups), side='right').astype(jnp.int32)
  total = seen[-1:] if steps == 1 else steps * jnp.sum(rows, dtype=jnp.int32)[None]
  return Blocks(turn, jnp.minimum(order, num_groups - 1), total)


def scratch(matrices: Sequence[Array], block: tuple[int, int]) -> list[Any]:
  """Buffers of each matrix, and a semaphore for each buffer."""
  buffers = [pltpu.VMEM((BUFFERS, *block), matrix.dtype) for matrix in matrices]
  return [*buffers, pltpu.SemaphoreType.DMA((len(matrices), BUFFERS))]


class Weights:
  """The blocks of one kernel.

  Args:
    matrices: `[E, K, N]` or transposed, in the memory of the device.
    buffers, arrived: of `scratch`.
    group: of each visit.
    blocks: references to those of `blocks_of`.
    tile: rows and columns of a block, of K and N or transposed.
    steps: blocks of K.
    transposed: whether matrices are `[E, N, K]`.
    columns: tiles of columns that a group goes through before the next one comes; turns count them then. 1: the tile
      is told when a block is taken up.
  """

  def __init__(
    self, matrices, buffers, arrived, group, blocks: Blocks, tile, steps, transposed, columns=1
  ):
    self.matrices, self.buffers, self.arrived = matrices, buffers, arrived
    self.group, self.blocks = group, blocks
    self.tile, self.steps, self.transposed, self.columns = tile, steps, transposed, columns

  def take_up(self, n, v, k, needed) -> Array:
    """Which buffer holds the block of tile of columns `n`, visit `v` and step `k`, all being `needed`.

    In a block's first step it asks for the block that comes two later, whose buffer was last read in the step before,
    and waits for its own. Every block that is asked for is waited for, so that none is left under way at the end.
    """
    index = self.blocks.turn[v] if self.steps == 1 else v * self.steps + k
    total = self.blocks.total[0]

    @pl.when((v == 0) & (k == 0))
    def _():
      for early in range(BUFFERS - 1):
        pl.when(early < total)(functools.partial(self._start, jnp.int32(early), n))

    same = (v > 0) & (self.blocks.turn[jnp.maximum(v - 1, 0)] == index)
    first = needed & ~same if self.steps == 1 else needed

    @pl.when(first)
    def _():
      later = index + BUFFERS - 1
      pl.when(later < total)(functools.partial(self._start, later, n))
      for copy in self._copies(index, n):
        copy.wait()

    return jax.lax.rem(index, jnp.int32(BUFFERS))

  def _start(self, index, n):
    for copy in self._copies(index, n):
      copy.start()

  def _copies(self, index, n):
    if self.steps == 1 and self.columns > 1:
      turn, n = (
        jax.lax.div(index, jnp.int32(self.columns)),
        jax.lax.rem(index, jnp.int32(self.columns)),
      )
      group, k = self.blocks.order[turn], 0
    elif self.steps == 1:
      group, k = self.blocks.order[index], 0
    else:
      visit = jax.lax.div(index, jnp.int32(self.steps))
      group, k = self.group[visit], index - visit * self.steps
    place = (n, k) if self.transposed else (k, n)
    slot = jax.lax.rem(index, jnp.int32(BUFFERS))
    for i, (matrix, buffer) in enumerate(zip(self.matrices, self.buffers, strict=True)):
      axes = zip(place, self.tile, matrix.shape[1:], strict=True)
      source = matrix.at[(group, *(cut(*axis) for axis in axes))]
      yield pltpu.make_async_copy(source, buffer.at[slot], self.arrived.at[i, slot])


def cut(index, size, whole):
  """The part of an axis; parts of several are multiples of 128."""
  return pl.ds(0, whole) if size == whole else pl.ds(pl.multiple_of(index * size, 128), size)
