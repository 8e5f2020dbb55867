"""Grouped matmuls for TPUs: `rows @ matrix of the row's group`, and sums over a group's rows.

Blocks of rows are moved by the grid's own pipeline, those of matrices by the kernel (tpu_weights.py). The visits
(visits.py) are scalars that index maps read, and the grid is as long as there are visits: tiles that no group has are
neither read nor computed. A tile that lies within one group is one matmul; where groups meet, only the parts of a tile
that hold rows of the group are computed, and rows of groups before are kept. Where a chip's two cores are one device
(v4, v5p), they share out the tiles of columns; of 7x each core is a device.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tpu_weights
from .compat import struct_like
from .tpu_tiles import LIMIT, PART, Tiles
from .visits import Visits

Array = jax.Array


class Rows(NamedTuple):
  """An operand or result with a row axis.

  Attributes:
    array: `[R, width]`, or `[S, R, width]`; of a result, its type.
    at: for three axes, which of S, or None for all of them.
    lanes: one number a row, rows along the lanes: `[1, R]`, or `[n_tiles, 1, R]`.
  """

  array: Array | jax.ShapeDtypeStruct
  at: int | None = None
  lanes: bool = False


class Product(NamedTuple):
  """`sums[into] += lhs[left] @ rhs[right]`."""

  left: int
  right: int
  into: int


def matmul(
  lhs: Sequence[Rows],
  rhs: Sequence[Array],
  visits: Visits,
  tiles: Tiles,
  *,
  products: Sequence[Product] = (Product(0, 0, 0),),
  transpose_rhs: bool = False,
  extras: Sequence[Rows] = (),
  per_group: Sequence[Array] = (),
  outs: Sequence[Rows],
  epilogue: Callable | None = None,
  name: str,
) -> Sequence[Array]:
  """`epilogue(sums, extras)` of every row.

  Args:
    lhs: rows `[R, K]`.
    rhs: matrices `[E, K, N]`, or `[E, N, K]` with `transpose_rhs`.
    visits: of row tiles; rows that they leave out are unspecified in the results.
    tiles: K and N are multiples of theirs.
    products: what is multiplied.
    extras: rows `[R, N]` that the epilogue reads; of lanes `[1, R]` it reads `[1, rows]`.
    per_group: `[E, 1, N]`, of which the epilogue reads its group's row, after the extras.
    outs: types of the results: as extras. Of lanes `[n_tiles, 1, R]` each column tile writes its own row.
    epilogue: `(sums, extras) -> results` in float32 or the type of the result.
    name: of the compiled kernel.
  """
  inner, columns = rhs[0].shape[1:][:: -1 if transpose_rhs else 1]
  steps = inner // tiles.inner
  grid = (columns // tiles.columns, _length(visits), steps)
  num_sums = 1 + max(p.into for p in products) if steps > 1 else 0
  sums = [pltpu.VMEM((tiles.rows, tiles.columns), jnp.float32)] * num_sums
  block = (tiles.columns, tiles.inner) if transpose_rhs else (tiles.inner, tiles.columns)
  body = functools.partial(
    _matmul_kernel,
    counts=(len(lhs), len(rhs), len(extras), len(per_group), len(outs), num_sums, len(rhs)),
    block=block,
    lanes=([x.lanes for x in extras], [x.lanes for x in outs]),
    products=products,
    transpose_rhs=transpose_rhs,
    epilogue=epilogue or (lambda sums, extras: sums),
    steps=steps,
  )

  last = rhs[0].shape[0] - 1
  lhs_specs = [_rows_spec(x, tiles.rows, tiles.inner, lambda n, k: k) for x in lhs]
  wide = [_rows_spec(x, tiles.rows, tiles.columns, lambda n, k: n) for x in (*extras, *outs)]
  matrices = [pl.BlockSpec(memory_space=pl.ANY)] * len(rhs)
  group_at = lambda n, v, k, tile, group, *_: (jnp.minimum(group[v], last), 0, n)
  group_spec = pl.BlockSpec((None, 1, tiles.columns), group_at)
  scalars = (*visits, *tpu_weights.blocks_of(visits, steps))
  return pl.pallas_call(
    body,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=grid,
      in_specs=[*lhs_specs, *matrices, *wide[: len(extras)], *[group_spec] * len(per_group)],
      out_specs=wide[len(extras) :],
      scratch_shapes=[*sums, *tpu_weights.scratch(rhs, block)],
    ),
    out_shape=[struct_like(x.array.shape, x.array.dtype, visits.tile) for x in outs],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary'), vmem_limit_bytes=LIMIT
    ),
    name=name,
  )(*scalars, *(x.array for x in lhs), *rhs, *(x.array for x in extras), *per_group)


def _length(visits: Visits) -> Array:
  """Visits to make; one that does nothing where there are none, for a grid is not empty."""
  return jnp.maximum(visits.used[0], 1)


def _rows_spec(x: Rows, rows: int, width: int, column) -> pl.BlockSpec:
  shape = x.array.shape
  if x.lanes:
    if len(shape) == 2:
      return pl.BlockSpec((1, rows), lambda n, v, k, tile, *_: (0, tile[v]))
    return pl.BlockSpec((None, 1, rows), lambda n, v, k, tile, *_: (n, 0, tile[v]))
  index = lambda n, v, k, tile, *_: (tile[v], column(n, k))
  if len(shape) == 2:
    return pl.BlockSpec((rows, width), index)
  if x.at is None:
    return pl.BlockSpec((shape[0], rows, width), lambda *args: (0, *index(*args)))
  return pl.BlockSpec((None, rows, width), lambda *args: (x.at, *index(*args)))


def _matmul_kernel(
  tile,
  group,
  starts,
  used,
  turn,
  order,
  total,
  *refs,
  counts,
  block,
  lanes,
  products,
  transpose_rhs,
  epilogue,
  steps,
):
  rest = iter(refs)
  lhs, rhs, extras, per_group, outs, sums, buffers = (
    [next(rest) for _ in range(c)] for c in counts
  )
  blocks = tpu_weights.Blocks(turn, order, total)
  weights = tpu_weights.Weights(
    rhs, buffers, next(rest), group, blocks, block, steps, transpose_rhs
  )
  v, k = pl.program_id(1), pl.program_id(2)
  num_rows = lhs[0].shape[0]
  begin, end = (starts[group[v] + i] - tile[v] * num_rows for i in (0, 1))
  is_tail = group[v] == starts.shape[0] - 2
  needed = v < used[0]
  slot = weights.take_up(pl.program_id(0), v, k, needed & ~is_tail)

  def finish(part, found):
    shared = [x[...] for x in per_group]
    own = [_part(x, part, along) for x, along in zip(extras, lanes[0], strict=True)]
    merge(part, epilogue(found, [*own, *shared]))

  def merge(part, values):
    for ref, along, value in zip(outs, lanes[1], values, strict=True):
      _merge(ref, along, part, value, num_rows, begin, end)

  def zeros(part):
    return [_zeros(ref, along, part) for ref, along in zip(outs, lanes[1], strict=True)]

  def compute(part):
    found = [None] * (1 + max(p.into for p in products))
    for p in products:
      matrix = buffers[p.right][slot]
      product = dot(_part(lhs[p.left], part), matrix, (1, 1 if transpose_rhs else 0))
      found[p.into] = product if found[p.into] is None else found[p.into] + product
    if steps == 1:
      finish(part, found)
      return

    @pl.when(k == 0)
    def _():
      for total, product in zip(sums, found, strict=True):
        total[_rows(part)] = product

    @pl.when(k > 0)
    def _():
      for total, product in zip(sums, found, strict=True):
        total[_rows(part)] += product

    @pl.when(k == steps - 1)
    def _():
      finish(part, [total[_rows(part)] for total in sums])

  @pl.when(needed & ~is_tail)
  def _():
    each_part(num_rows, begin, end, compute)

  @pl.when(needed & is_tail & (k == steps - 1))
  def _():
    each_part(num_rows, begin, end, lambda part: merge(part, zeros(part)))


class Part(NamedTuple):
  """Rows `first..first + height` of a tile."""

  first: int | Array
  height: int


def each_part(num_rows, begin, end, body):
  """`body(part)`: the whole tile where one group has it, else its parts that hold rows `begin..end`."""
  height = min(PART, num_rows)
  if num_rows == height:
    pl.when(begin < end)(lambda: body(Part(0, num_rows)))
    return
  whole = (begin <= 0) & (end >= num_rows)
  pl.when(whole)(lambda: body(Part(0, num_rows)))

  @pl.when(~whole & (begin < end))
  def _():
    first = jax.lax.div(jnp.maximum(begin, 0), jnp.int32(height))
    last = jax.lax.div(jnp.minimum(end, num_rows) - 1, jnp.int32(height))
    one = lambda i, _: body(Part(pl.multiple_of(i * height, height), height))
    jax.lax.fori_loop(first, last + 1, one, None)


def _merge(ref, lanes, part, value, num_rows, begin, end):
  """Writes a part of a result. Rows of groups before stay, rows of groups after are zero until these come."""
  for i, one in enumerate(value if isinstance(value, tuple) else (value,)):
    at = (slice(None), _rows(part)) if lanes else (_rows(part), slice(None))
    at = (i, *at) if isinstance(value, tuple) else at
    one = one.astype(ref.dtype)
    if _cut(part, num_rows):
      row = part.first + jax.lax.broadcasted_iota(jnp.int32, one.shape, 1 if lanes else 0)
      one = jnp.where(row < begin, ref[at], jnp.where(row < end, one, jnp.zeros_like(one)))
    ref[at] = one


def _cut(part, num_rows):
  """Whether a part may hold rows of other groups: the whole of a tall tile does not."""
  return part.height < num_rows or num_rows <= PART


def _rows(part):
  return pl.ds(part.first, part.height)


def _part(ref, part, lanes=False):
  if lanes:
    return ref[:, _rows(part)]
  if len(ref.shape) == 2:
    return ref[_rows(part), :]
  return tuple(ref[i, _rows(part), :] for i in range(ref.shape[0]))


def _zeros(ref, lanes, part):
  if lanes:
    return jnp.zeros((1, part.height), ref.dtype)
  zeros = jnp.zeros((part.height, ref.shape[-1]), ref.dtype)
  return zeros if len(ref.shape) == 2 else (zeros,) * ref.shape[0]


def dot(a, b, contract):
  """Contracts axis `contract[0]` of `a` with `contract[1]` of `b`, in float32; float32 is not rounded before."""
  b = b.astype(a.dtype)
  exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.dtype('float32') else None
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dimensions, precision=exact, preferred_element_type=jnp.float32)


def sum_of_products(
  lhs: Rows, rhs: Sequence[Rows], visits: Visits, tiles: Tiles, *, dtype, name: str
) -> Sequence[Array]:
  """`out[e] = sum over rows r of group e of lhs[r]^T rhs[r]`, `[E, K, N]` for each of `rhs`; empty groups are zero.

  `visits` must visit empty groups and no rows past the last one.
  """
  width, columns = lhs.array.shape[-1], rhs[0].array.shape[-1]
  num_groups = visits.starts.shape[0] - 2
  grid = (width // tiles.inner, columns // tiles.columns, _length(visits))
  left = _rows_spec_of_sum(lhs, tiles.rows, tiles.inner, 0)
  right = [_rows_spec_of_sum(x, tiles.rows, tiles.columns, 1) for x in rhs]
  block = (None, tiles.inner, tiles.columns)
  out = pl.BlockSpec(block, lambda i, j, v, tile, group, starts, used: (group[v], i, j))
  return pl.pallas_call(
    functools.partial(_sum_kernel, count=len(rhs)),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=grid,
      in_specs=[left, *right],
      out_specs=[out] * len(rhs),
      scratch_shapes=[pltpu.VMEM(block[1:], jnp.float32)] * len(rhs),
    ),
    out_shape=[struct_like((num_groups, width, columns), dtype, visits.tile)] * len(rhs),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=LIMIT
    ),
    name=name,
  )(*visits, lhs.array, *(x.array for x in rhs))


def _rows_spec_of_sum(x: Rows, rows: int, width: int, axis: int) -> pl.BlockSpec:
  index = lambda *args: (args[3][args[2]], args[axis])
  if len(x.array.shape) == 2:
    return pl.BlockSpec((rows, width), index)
  return pl.BlockSpec((None, rows, width), lambda *args: (x.at, *index(*args)))


def _sum_kernel(tile, group, starts, used, lhs, *refs, count):
  rhs, outs, sums = refs[:count], refs[count : 2 * count], refs[2 * count :]
  v, visits = pl.program_id(2), pl.num_programs(2)
  num_rows = lhs.shape[0]
  begin, end = (starts[group[v] + i] - tile[v] * num_rows for i in (0, 1))

  @pl.when((v == 0) | (group[jnp.maximum(v - 1, 0)] != group[v]))
  def _():
    for total in sums:
      total[...] = jnp.zeros_like(total)

  def compute(part):
    left, rights = _part(lhs, part), [_part(x, part) for x in rhs]
    if _cut(part, num_rows):
      # What other rows hold may be NaN, and there may be none.
      masked = lambda x: jnp.where(_inside(x, part, begin, end), x, jnp.zeros_like(x))
      left, rights = masked(left), [masked(x) for x in rights]
    for total, right in zip(sums, rights, strict=True):
      total[...] += dot(left, right, (0, 0))

  @pl.when(v < used[0])
  def _():
    each_part(num_rows, begin, end, compute)

  @pl.when((v == visits - 1) | (group[jnp.minimum(v + 1, visits - 1)] != group[v]))
  def _():
    for out, total in zip(outs, sums, strict=True):
      out[...] = total[...].astype(out.dtype)


def _inside(x, part, begin, end):
  row = part.first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  return (row >= begin) & (row < end)
