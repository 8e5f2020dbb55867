"""`exchange_matmul` and `matmul_exchange` for TPUs: products of some experts while rows of others are on their way.

One kernel walks through this device's experts (steps.py). On the way there all copies are started first, those for the
first expert of every device before those for the second, and an expert's rows are waited for when all products of the
one before are made. On the way back an expert's rows are sent as soon as they are written, and what comes is waited for
at the end. Weights are read once, three blocks ahead (tpu_weights.py); tiles of rows come, and results go, through two
buffers each. One core does it all: where a chip's two cores are one device (v4, v5p), the other one rests.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tpu_copies, tpu_tiles, tpu_weights
from ..compat import struct_like
from ..segments import CHUNK, Route, up
from ..tpu_copies import span
from ..tpu_matmul import Part, Product, Rows, dot, each_part, sum_of_products
from ..tpu_tiles import LIMIT, Tiles
from ..visits import visit
from .steps import Steps, steps

Array = jax.Array
COLLECTIVE = {'there': 18, 'back': 19}


class _Kind(NamedTuple):
  """What a kernel is made for.

  Attributes:
    there: products after the rows have come, or before they go back.
    tiles: of a step.
    products: of operands and matrices.
    transpose_rhs: matrices are `[E, F, D]`.
    axis_name: of the mesh.
    axes: all of the mesh.
  """

  there: bool
  tiles: Tiles
  products: tuple[Product, ...]
  transpose_rhs: bool
  axis_name: str
  axes: tuple[str, ...]


def there(x_rd, rhs, route: Route, *, num_rows, axis_name, transpose_rhs):
  """`(received [num_rows, D], out [num_rows, F] for each of rhs)`, unspecified outside of the segments.

  Args:
    x_rd: rows to send.
    rhs: matrices `[E, D, F]`, or transposed, of this device's experts.
    route: of the rows.
    num_rows: that this device has room for.
    axis_name: of the mesh.
    transpose_rhs: matrices are `[E, F, D]`.

  Raises:
    Unsupported: float16 or float64, no multiples of CHUNK rows, or widths of which no tile fits.
  """
  type_of = lambda width: jax.ShapeDtypeStruct((num_rows, width), x_rd.dtype)
  outs = [type_of(_widths(w, transpose_rhs)[1]) for w in rhs]
  products = tuple(Product(0, i, i) for i in range(len(rhs)))
  far = type_of(x_rd.shape[1])
  options = dict(axis_name=axis_name, transpose_rhs=transpose_rhs)
  return _call(True, [x_rd], rhs, route, far, outs, products, **options)


def back(lhs, rhs, route: Route, *, num_rows, axis_name, transpose_rhs):
  """`sum_i lhs_i @ rhs_i` of every row where it came from, `[num_rows, F]`, unspecified outside of the segments.

  `route` is that of the rows on their way there; the rest as of `there`.
  """
  type_of = lambda rows: jax.ShapeDtypeStruct(
    (rows, _widths(rhs[0], transpose_rhs)[1]), lhs[0].dtype
  )
  products = tuple(Product(i, i, 0) for i in range(len(rhs)))
  outs = [type_of(lhs[0].shape[0])]
  options = dict(axis_name=axis_name, transpose_rhs=transpose_rhs)
  return _call(False, lhs, rhs, route, type_of(num_rows), outs, products, **options)[0]


def sums(left, right: Sequence[Array], route: Route, *, axis_name, dtype):
  """`out[e] = sum over the rows r of expert e of left[r]^T right[r]`, for each of `right`.

  Both must be zero outside of the segments.
  """
  num_rows, count = left.shape[0], route.size.shape[2]
  widths = left.shape[1], right[0].shape[1]
  tiles = tpu_tiles.for_groups(num_rows, count, *widths, left.dtype.itemsize, rhs=len(right))
  first, rows = _areas(route, num_rows, axis_name)
  starts = jnp.append(first, first[-1:] + rows[-1:])
  visits = visit(starts, num_rows, tiles.rows, empty=True)
  options = dict(dtype=dtype, name='exchange_matmul_drhs')
  return sum_of_products(Rows(left), [Rows(x) for x in right], visits, tiles, **options)


def _widths(matrix, transpose_rhs):
  return matrix.shape[1:][:: -1 if transpose_rhs else 1]


def _areas(route, num_rows, axis_name):
  """First row and number of rows of each expert of this device: the segments of all senders."""
  me, room = jax.lax.axis_index(axis_name), num_rows // CHUNK * CHUNK
  first = jnp.minimum(route.put[0, me], room)
  rows = jnp.sum(up(route.size[:, me]), axis=0, dtype=jnp.int32)
  return first, jnp.minimum(rows, room - first)


def _call(is_there, lhs, rhs, route, far, outs, products, *, axis_name, transpose_rhs):
  here = outs[0].shape[0]
  tpu_copies.check('exchange_matmul', *rhs, lhs=lhs[0], out=outs[0], far=far)
  inner, columns = _widths(rhs[0], transpose_rhs)
  itemsize = max(lhs[0].dtype.itemsize, rhs[0].dtype.itemsize)
  counts = dict(lhs=1 if is_there else len(lhs), rhs=len(rhs), sums=len(outs), outs=len(outs))
  count = rhs[0].shape[0]
  tiles = tpu_tiles.for_rows(here, count, inner, columns, itemsize, whole=True, **counts)
  first, rows = _areas(route, here, axis_name)
  walk, blocks = steps(first, rows, here, tiles.rows, columns // tiles.columns)
  tables = tpu_copies.tables(route if is_there else route.back(), axis_name)
  scalars = (*walk, *blocks, *tables)
  block = (tiles.columns, tiles.inner) if transpose_rhs else (tiles.inner, tiles.columns)
  buffers = lambda number, width: [pltpu.VMEM((2, tiles.rows, width), far.dtype)] * number
  kind = _Kind(is_there, tiles, products, transpose_rhs, axis_name, tpu_copies.axes())
  in_memory = pl.BlockSpec(memory_space=pl.ANY)
  results = (far, *outs)
  return pl.pallas_call(
    functools.partial(_kernel, kind=kind),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(1,),
      in_specs=[in_memory] * (len(lhs) + len(rhs)),
      out_specs=[in_memory] * len(results),
      scratch_shapes=[
        *buffers(counts['lhs'], inner),
        *buffers(len(outs), tiles.columns),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
        *tpu_copies.semaphores(count),
        *tpu_weights.scratch(rhs, block),
      ],
    ),
    out_shape=[struct_like(x.shape, x.dtype, walk.group) for x in results],
    compiler_params=pltpu.CompilerParams(
      collective_id=COLLECTIVE['there' if is_there else 'back'],
      has_side_effects=True,
      vmem_limit_bytes=LIMIT,
    ),
    name='exchange_matmul' if is_there else 'matmul_exchange',
  )(*scalars, *lhs, *rhs)


class _Refs(NamedTuple):
  """What the kernel is called with: scalars, operands, results, and scratch memory.

  Attributes:
    walk, blocks, tables: of the steps, the blocks of matrices and the copies.
    lhs, rhs: operands and matrices.
    far: the rows of other devices: those that came, or those that go back.
    outs: results of the products.
    rows, made: two buffers for each of the operands, of the results.
    loaded, stored: semaphores of these.
    sent, arrived: of `tpu_copies.semaphores`.
    buffers, fetched: of `tpu_weights.scratch`.
  """

  walk: Steps
  blocks: tpu_weights.Blocks
  tables: tpu_copies.Tables
  lhs: list
  rhs: list
  far: Any
  outs: list
  rows: list
  made: list
  loaded: Any
  stored: Any
  sent: Any
  arrived: Any
  buffers: list
  fetched: Any


def _named(refs, products: Sequence[Product]) -> _Refs:
  """The kernel's arguments by name, as `_call` lists them."""
  rest = iter(refs)
  some = lambda count: [next(rest) for _ in range(count)]
  record = lambda of: of(*some(len(of._fields)))
  lefts, rights, results = (1 + max(p[i] for p in products) for i in range(3))
  scalars = record(Steps), record(tpu_weights.Blocks), record(tpu_copies.Tables)
  arrays = some(lefts), some(rights), next(rest), some(results)
  scratch = some(lefts), some(results), *some(4), some(rights), next(rest)
  return _Refs(*scalars, *arrays, *scratch)


class _Walk:
  """The phases of a step, of index `v`; the rows of the next one come, and results of the last go, beside it."""

  def __init__(self, refs: _Refs, kind: _Kind):
    self.refs, self.kind, self.group = refs, kind, refs.walk.group
    block, columns = refs.buffers[0].shape[1:], refs.outs[0].shape[1] // kind.tiles.columns
    self.weights = tpu_weights.Weights(
      refs.rhs,
      refs.buffers,
      refs.fetched,
      self.group,
      refs.blocks,
      block,
      1,
      kind.transpose_rhs,
      columns,
    )
    ends = (refs.lhs[0], refs.far) if kind.there else (refs.outs[0], refs.far)
    self.copies = tpu_copies.Copies(
      refs.tables, *ends, refs.sent, refs.arrived, kind.axis_name, kind.axes
    )
    self.used = refs.walk.used[0]

  def begin(self, v):
    """Asks for the step's rows; on the way there an expert's first step waits until they have come."""
    group = self.group
    if self.kind.there:
      new = (v == 0) | (group[jnp.maximum(v - 1, 0)] != group[v])
      pl.when(new)(lambda: self.copies.wait_for(group[v]))
    for copy in self._load(v):
      copy.start()

  def step(self, v, _):
    """Products of step `v`; begins the next step and finishes the last one."""
    # Rows that have not come yet are waited for after the products, others come beside them.
    late = self._is_last(v) if self.kind.there else False
    following = v + 1 < self.used
    pl.when(following & ~late if self.kind.there else following)(lambda: self.begin(v + 1))
    matrix = self.weights.take_up(0, v, jnp.int32(0), v < self.used)
    for copy in self._load(v):
      copy.wait()
    self._multiply(v, matrix)
    for copy in self._store(v):
      copy.start()
    if self.kind.there:
      pl.when(following & late)(lambda: self.begin(v + 1))
    pl.when(v > 0)(lambda: self.finish(v - 1))

  def finish(self, v):
    """Waits for the step's results; on the way back an expert's last step sends them."""
    for copy in self._store(v):
      copy.wait()
    if not self.kind.there:
      pl.when(self._is_last(v))(lambda: self.copies.send(self.group[v]))

  def _is_last(self, v):
    """Whether the next step is another expert's, or none."""
    group, used = self.group, self.used
    return (v + 1 == used) | (group[jnp.minimum(v + 1, used - 1)] != group[v])

  def _load(self, v):
    """Copies of the step's rows."""
    refs, walk = self.refs, self.refs.walk
    slot, at = jax.lax.rem(v, jnp.int32(2)), span(walk.first[v], walk.rows[v])
    sources = [refs.far] if self.kind.there else refs.lhs
    for source, buffer in zip(sources, refs.rows, strict=True):
      to = buffer.at[slot, span(0, walk.rows[v])]
      yield pltpu.make_async_copy(source.at[at], to, refs.loaded.at[slot])

  def _store(self, v):
    """Copies of the step's results."""
    refs, walk = self.refs, self.refs.walk
    slot, at = jax.lax.rem(v, jnp.int32(2)), span(walk.first[v], walk.rows[v])
    for out, buffer in zip(refs.outs, refs.made, strict=True):
      to = out.at[at, tpu_weights.cut(walk.column[v], self.kind.tiles.columns, out.shape[1])]
      result = buffer.at[slot, span(0, walk.rows[v])]
      yield pltpu.make_async_copy(result, to, refs.stored.at[slot])

  def _multiply(self, v, matrix):
    """The step's results, of the blocks that buffer `matrix` holds."""
    refs, slot = self.refs, jax.lax.rem(v, jnp.int32(2))

    def compute(part: Part):
      at, found = pl.ds(part.first, part.height), dict[int, Array]()
      for p in self.kind.products:
        contract = (1, 1 if self.kind.transpose_rhs else 0)
        product = dot(refs.rows[p.left][slot, at], refs.buffers[p.right][matrix], contract)
        found[p.into] = product + found[p.into] if p.into in found else product
      for into, value in found.items():
        refs.made[into][slot, at] = value.astype(refs.made[into].dtype)

    each_part(self.kind.tiles.rows, jnp.int32(0), refs.walk.rows[v], compute)


def _kernel(*refs, kind: _Kind):
  walk = _Walk(_named(refs, kind.products), kind)
  walk.copies.meet()
  if kind.there:
    walk.copies.send_all()
  pl.when(walk.used > 0)(lambda: walk.begin(jnp.int32(0)))
  jax.lax.fori_loop(jnp.int32(0), walk.used, walk.step, None)
  pl.when(walk.used > 0)(lambda: walk.finish(walk.used - 1))
  walk.copies.wait_sent()
  if not kind.there:
    walk.copies.wait_for_all()
