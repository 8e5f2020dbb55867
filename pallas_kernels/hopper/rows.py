"""Rows times the matrix of their expert: the kernel of every product with a ragged number of rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..compat import struct_like, vary_like
from . import compat, gather, ring, target
from .compat import pl, plgpu
from .epilogues import Part
from .layout import DEPTH, Layout
from .target import Target
from .tiles import Tiles

# Tiles of rows whose columns are visited together, so that the cache holds both operands.
RASTER = 8


def run(name, lhs, matrices, layout: Layout, tiles: Tiles, epilogue, **options):
  """Applies `epilogue` to the tiles of `lhs[p] @ matrices[expert of p]`, for padded rows p.

  Args:
    name: of the kernel in profiles.
    lhs: `[P, D]` in the padded layout; with `index`, `[R, D]` whose rows `index [P]` are taken, zeros for -1.
    matrices: one or two of `[E, D, F]`, of the type of lhs.
    epilogue: an object of epilogues.py.
    options: `index`; `transposed`, when the matrices are `[E, F, D]`; `summed`, when the products with each matrix
      are added, lhs being as many times as wide. Otherwise each matrix has an accumulator of its own.

  Returns the epilogue's outputs.
  """
  aim = target.current()
  index = options.pop('index', None)
  if index is not None:
    lhs, index = gather.prepare(aim, lhs, index)
  widths = matrices[0].shape[1:]
  plan = _Plan(aim, tiles, lhs.dtype, len(matrices), widths, gathered=index is not None, **options)
  inputs = [layout.expert, layout.used, lhs, *matrices]
  inputs += [] if index is None else [index]

  def body(*refs, **scratch):
    given, rest = refs[: len(inputs)], refs[len(inputs) :]
    own, out = rest[: len(epilogue.inputs)], rest[len(epilogue.inputs) :]
    _Block(plan, epilogue, given, own, out, scratch).run()

  kernel = compat.kernel(
    body,
    out_type=[
      struct_like(shape, kind, lhs)
      for shape, kind in epilogue.outputs(layout.row.shape[0], plan.strips)
    ],
    scratch={**plan.scratch(), **epilogue.scratch(tiles)},
    grid=aim.blocks,
    name=name,
    approximate=epilogue.approximate,
  )
  return [vary_like(out, lhs) for out in kernel(*inputs, *epilogue.inputs)]


def raster(index, used, column_tiles):
  """(tile of rows, tile of columns): RASTER tiles of rows for each tile of columns, then the next RASTER.

  The last of `used` tiles of rows may be fewer than RASTER.
  """
  group = jax.lax.div(index, jnp.int32(RASTER * column_tiles))
  rest = index - group * (RASTER * column_tiles)
  height = jnp.minimum(used - group * RASTER, RASTER)
  column = jax.lax.div(rest, height)
  return group * RASTER + rest - column * height, column


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts of a kernel."""

  aim: Target
  tiles: Tiles
  dtype: Any
  matrices: int
  widths: tuple[int, int]  # of a matrix, as it lies in memory
  gathered: bool
  transposed: bool = False
  summed: bool = False

  @property
  def sides(self) -> int:
    """Matrices whose products are kept apart."""
    return 1 if self.summed else self.matrices

  @property
  def width(self) -> int:
    """Columns of one matrix's product in a tile."""
    return self.tiles.columns // self.sides

  @property
  def column_tiles(self) -> int:
    return self.widths[0 if self.transposed else 1] // self.width

  @property
  def steps(self) -> int:
    """DEPTHs of one matrix."""
    return self.widths[1 if self.transposed else 0] // DEPTH

  @property
  def all_steps(self) -> int:
    return self.steps * (self.matrices // self.sides)

  @property
  def parts(self) -> int:
    return 1 if self.tiles.halves == 'rows' else 2

  @property
  def part(self) -> tuple[int, int]:
    """Rows and columns of one accumulator."""
    return self.tiles.part[0], self.tiles.part[1] // self.sides

  @property
  def strips(self) -> int:
    """Parts of one row's columns that different warpgroups hold."""
    return self.column_tiles * self.parts

  def scratch(self) -> dict:
    tiles, dtype = self.tiles, self.dtype
    right = (self.width, DEPTH) if self.transposed else (DEPTH, self.width)
    scratch = {
      'left': ring.stages((tiles.stages, tiles.rows, DEPTH), dtype),
      'right': ring.stages((tiles.stages, self.sides, *right), dtype),
      **ring.barriers(tiles.stages, 1 + self.sides),
    }
    if self.gathered:
      scratch |= gather.scratch(self.aim, tiles.stages, tiles.rows)
    if self.transposed:
      scratch |= ring.turned_scratch(self.aim, dtype, (DEPTH, self.part[1]))
    return scratch


class _Block:
  """What one thread block does."""

  def __init__(self, plan: _Plan, epilogue, given, own, out, scratch):
    self.plan, self.epilogue = plan, epilogue
    self.expert, self.used, self.lhs = given[:3]
    self.matrices, self.index = given[3 : 3 + plan.matrices], given[-1]
    self.own, self.out, self.scratch = own, out, scratch
    self.left, self.right, self.full = (scratch[name] for name in ('left', 'right', 'full'))
    self.ring = ring.Ring(plan.tiles.stages, self.full, scratch['empty'])

  def run(self):
    self.mine = ring.count(self.used[0] * self.plan.column_tiles, self.plan.aim.blocks)
    ring.specialise(self.fill, self.consume, 'gather' if self.plan.gathered else 'copy')

  def place(self, i):
    """Tile of rows and tile of columns of this block's work item i."""
    index = jax.lax.axis_index('sm') + i * self.plan.aim.blocks
    return raster(index, self.used[0], self.plan.column_tiles)

  def fill(self):
    plan, landed = self.plan, None
    if plan.gathered:
      landed = lambda slot, pending: gather.wait(plan.aim, pending, self.landed(slot))
    after = lambda i, tile: self.epilogue.load(i, *tile[:2], plan.tiles, self.own, self.scratch)
    ring.fill(self.ring, self.mine, self.start, self.load, landed, after)
    self.epilogue.drain(self.mine, self.scratch)

  def start(self, i):
    m, n = self.place(i)
    return (m, n, self.expert[m]), jnp.int32(self.plan.all_steps)

  def load(self, tile, k, slot):
    m, n, e = tile
    self.load_left(m, k, slot)
    if not self.plan.summed:
      self.load_right(self.matrices, e, n, k, slot)
      return
    for i, matrix in enumerate(self.matrices):
      first = i * self.plan.steps

      @pl.when((k >= first) & (k < first + self.plan.steps))
      def _(matrix=matrix, first=first):
        self.load_right((matrix,), e, n, k - first, slot)

  def landed(self, slot):
    return self.scratch['landed'].at[slot] if 'landed' in self.scratch else None

  def load_left(self, m, k, slot):
    row, column, stage = m * self.plan.tiles.rows, k * DEPTH, self.left.at[slot]
    if self.plan.gathered:
      gather.start(self.plan.aim, self.lhs, self.index, row, column, stage, self.landed(slot))
    else:
      rows = pl.ds(row, self.plan.tiles.rows)
      plgpu.copy_gmem_to_smem(self.lhs.at[rows, pl.ds(column, DEPTH)], stage, self.full.at[slot])

  def load_right(self, matrices, e, n, k, slot):
    depth, columns = pl.ds(k * DEPTH, DEPTH), pl.ds(n * self.plan.width, self.plan.width)
    for s, matrix in enumerate(matrices):
      box = matrix.at[e, columns, depth] if self.plan.transposed else matrix.at[e, depth, columns]
      plgpu.copy_gmem_to_smem(box, self.right.at[slot, s], self.full.at[slot])

  def consume(self, wg):
    tiles = self.plan.tiles

    def visit(i, step):
      def with_accumulators(*accs):
        def product(slot):
          for s, acc in enumerate(accs):
            plgpu.wgmma(acc, *self.operands(slot, s, wg))

        steps = jnp.int32(self.plan.all_steps)
        after = ring.multiply(self.ring, step, steps, product, len(accs))
        return after, [acc[...] for acc in accs]

      kind = plgpu.ACC(self.plan.part, jnp.float32)
      step, accs = pl.run_scoped(with_accumulators, *[kind] * self.plan.sides)
      m, n = self.place(i)
      part = Part.of(tiles, m, n, wg)
      self.epilogue.store(accs, part, self.own, self.out, self.scratch)
      return step

    jax.lax.fori_loop(jnp.int32(0), self.mine, visit, jnp.int32(0))

  def operands(self, slot, side, wg):
    """What this warpgroup multiplies: its rows with all columns, or all rows with its columns."""
    left, (height, width) = self.left.at[slot], self.plan.part
    columns: Any = slice(None)
    if self.plan.tiles.halves == 'rows':
      left = self.left.at[slot, pl.ds(wg * height, height)]
    else:
      columns = pl.ds(wg * width, width)
    if not self.plan.transposed:
      return left, self.right.at[slot, side, :, columns]
    right = self.right.at[slot, side, columns]
    return left, ring.turned(right, self.scratch.get('spare'), wg)
