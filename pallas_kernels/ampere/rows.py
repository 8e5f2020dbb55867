"""Rows times the matrix of their expert, and sums over the rows of each expert: the two kernels of a grouped matmul."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from ..compat import struct_like, vary_like
from ..hopper.rows import raster
from . import ring, store
from .machine import Hardware, numbered
from .ring import Ring
from .tiles import COLUMNS, DEPTH, cut, padded, window

ROWS = 128  # of the contraction's result tile


def products(machine: Hardware, lhs, matrices, starts, tile: int, *, transposed: bool):
  """`out[r] = lhs[r] @ matrices[e]`, zeros past the last group.

  Args:
    machine: what the kernel is made for.
    lhs: `[R, D]`, of the type of the matrices.
    matrices: `[E, D, F]`, or `[E, F, D]` if `transposed`.
    starts: first row of each group, and the end of the last.
    tile: rows of a tile, 64 or 128.
    transposed: see `matrices`.
  """
  num_rows, depth = lhs.shape
  num_experts, width = matrices.shape[0], matrices.shape[1 if transposed else 2]
  tiles, lhs = cut(starts, num_rows, tile), padded(lhs, tile)
  column_tiles = width // COLUMNS

  def body(expert, low, high, used, lhs, matrices, out, *, left, right, chunk, landed=None):
    block = jax.lax.axis_index('block')

    @pl.when(block < used[0] * column_tiles)
    def _():
      m, n = raster(block, used[0], column_tiles)
      e, top, column = expert[m], low[m], n * COLUMNS
      first = pl.multiple_of(jnp.minimum(window(top), lhs.shape[0] - tile), 8)

      def load(k):
        steps, columns = pl.ds(k * DEPTH, DEPTH), pl.ds(column, COLUMNS)
        matrix = matrices.at[e, columns, steps] if transposed else matrices.at[e, steps, columns]
        return lhs.at[pl.ds(first, tile), steps], matrix

      def product(left, right, k, acc, edge):
        del k, edge
        a, b = machine.left(left), machine.right(right, turned=transposed)
        return machine.multiply(acc, a, b)

      steps = jnp.where(e < num_experts, jnp.int32(depth // DEPTH), 0)
      acc = machine.zeros((tile, COLUMNS), lhs.dtype)
      acc = Ring(machine, left, right, landed).contract(steps, load, product, acc, edges=False)
      inside = (top - first, high[m] - first)
      store.write(machine, chunk, acc, out, top, column, inside)

  matrix = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
  scratch = _scratch(machine, (tile, DEPTH), matrix, lhs.dtype, lhs.dtype)
  shape, blocks = (num_rows, width), tiles.expert.shape[0] * column_tiles
  return _call('grouped_matmul', body, shape, lhs.dtype, scratch, blocks, [*tiles, lhs, matrices])


def sums(machine: Hardware, left, right, starts, dtype):
  """`out[e] = left[rows of e].T @ right[rows of e]`, zeros for experts without rows.

  Args:
    machine: what the kernel is made for.
    left: `[R, D]`.
    right: `[R, F]`, of the type of `left`.
    starts: first row of each group, and the end of the last; the rows after it are not read.
    dtype: of the result `[E, D, F]`.
  """
  num_experts, (height, width) = starts.shape[0] - 1, (left.shape[1], right.shape[1])
  left, right = padded(left, DEPTH), padded(right, DEPTH)
  row_tiles, column_tiles = height // ROWS, width // COLUMNS

  def body(starts, position, lefts, rights, out, *, left, right, chunk, landed=None):
    block = jax.lax.axis_index('block')
    e = jax.lax.div(block, jnp.int32(row_tiles * column_tiles))
    rest = block - e * (row_tiles * column_tiles)
    n = jax.lax.div(rest, jnp.int32(row_tiles))
    row, column = (rest - n * row_tiles) * ROWS, n * COLUMNS
    first, end = starts[e], starts[e + 1]
    begin = window(first)
    steps = jnp.where(end > first, jax.lax.div(end - begin + (DEPTH - 1), jnp.int32(DEPTH)), 0)

    def rows_of(k):
      return pl.multiple_of(jnp.minimum(begin + k * DEPTH, lefts.shape[0] - DEPTH), 8)

    def load(k):
      rows = pl.ds(rows_of(k), DEPTH)
      return lefts.at[rows, pl.ds(row, ROWS)], rights.at[rows, pl.ds(column, COLUMNS)]

    def product(left, right, k, acc, edge):
      own = begin + k * DEPTH
      # Rows of others are zero on both sides: a NaN of theirs, times zero, would be a NaN.
      kept = jnp.maximum(own, first) - rows_of(k), jnp.minimum(own + DEPTH, end) - rows_of(k)
      inside = kept if edge else None
      a = machine.left(left, turned=True, inside=inside)
      b = machine.right(right, inside=inside, position=position)
      return machine.multiply(acc, a, b)

    acc = machine.zeros((ROWS, COLUMNS), lefts.dtype)
    acc = Ring(machine, left, right, landed).contract(steps, load, product, acc, edges=True)
    store.write(machine, chunk, acc, out.at[e], row, column)

  scratch = _scratch(machine, (DEPTH, ROWS), (DEPTH, COLUMNS), left.dtype, dtype)
  shape, blocks = (num_experts, height, width), num_experts * row_tiles * column_tiles
  inputs = [starts, numbered(DEPTH, COLUMNS, right.dtype), left, right]
  return _call('grouped_matmul_drhs', body, shape, dtype, scratch, blocks, inputs)


def _scratch(machine, left, right, dtype, out_dtype) -> dict:
  return {
    'left': ring.stages(left, dtype),
    'right': ring.stages(right, dtype),
    'chunk': store.scratch(out_dtype),
    **machine.scratch(ring.STAGES),
  }


def _call(name, body, shape, dtype, scratch, blocks, inputs):
  like = inputs[-1]
  kernel = plgpu.kernel(
    body,
    out_type=struct_like(shape, dtype, like),
    scratch_types=scratch,
    grid=(blocks,),
    grid_names=('block',),
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
  )
  return vary_like(kernel(*inputs), like)
