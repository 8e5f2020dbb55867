"""Rows times matrices of eight bits: the kernel of a product that takes as long as its weights take to read.

The weights are the left operand of wgmma, from registers, and the rows the right one, so that a tile of few rows is
no waste: 16 of them are the least that a tile holds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..compat import struct_like, vary_like
from . import compat, gather, ring, target, widen
from .compat import pl, plgpu
from .layout import DEPTH, Layout
from .ring import CONSUMERS
from .rows import raster
from .target import Target

ROWS = (16, 32, 64, 128)
STAGES = 8
SHARED_MEMORY = 224 * 1024  # of 227 KiB; barriers take the rest


def rows_per_tile(num_rows: int, num_experts: int) -> int:
  """The fewest rows of a tile that hold the mean of a group and two standard deviations of a random one's.

  A group of two tiles reads its weights twice.
  """
  mean = num_rows / num_experts
  return next((rows for rows in ROWS if rows >= mean + 2 * mean**0.5), ROWS[-1])


def run(name, lhs, values, scale, kind: str, layout: Layout, *, gathered: bool):
  """`(lhs[p] @ values[expert of p]) * scale[expert of p]`, `[P, F]` for padded rows p.

  Args:
    name: of the kernel in profiles.
    lhs: `[R, D]`; not `gathered`: `[P, D]` in the padded layout.
    values: int8 `[E, D, F]`, whose bytes are of type `kind`.
    scale: float32 `[E, F]`.
    kind: 'int8' or 'float8_e4m3fn'.
    layout: of tiles of ROWS.
    gathered: the kernel fetches the rows itself.
  """
  aim, index = target.current(), []
  if gathered:
    lhs, row = gather.prepare(aim, lhs, layout.row)
    index = [row]
  _, inner, width = values.shape
  plan = _Plan(aim, layout.tile, lhs.dtype, kind, inner, width, gathered)
  inputs = [layout.expert, layout.used, lhs, values, scale, *index]

  def body(*refs, **scratch):
    _Block(plan, refs[: len(inputs)], refs[-1], scratch).run()

  kernel = compat.kernel(
    body,
    out_type=struct_like((layout.row.shape[0], plan.width), lhs.dtype, lhs),
    scratch=plan.scratch(),
    grid=aim.blocks,
    name=name,
    approximate=False,
  )
  return vary_like(kernel(*inputs), lhs)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts of a kernel."""

  aim: Target
  rows: int
  dtype: Any
  kind: str
  inner: int
  width: int
  gathered: bool

  @property
  def matrices(self) -> int:
    """Blocks of columns in a tile: one for each warpgroup where the width allows, else they share out the rows."""
    return CONSUMERS if self.width % (CONSUMERS * widen.COLUMNS) == 0 else 1

  @property
  def columns(self) -> int:
    return self.matrices * widen.COLUMNS

  @property
  def column_tiles(self) -> int:
    return self.width // self.columns

  @property
  def part(self) -> int:
    """Rows of a warpgroup."""
    return self.rows * self.matrices // CONSUMERS

  @property
  def stages(self) -> int:
    stage = DEPTH * (self.columns + 2 * self.rows)
    out = CONSUMERS * self.part * widen.COLUMNS * 2
    return min(STAGES, (SHARED_MEMORY - out) // stage)

  def scratch(self) -> dict:
    out = (CONSUMERS, self.part, widen.COLUMNS)
    scratch = {
      'lhs': ring.stages((self.stages, self.rows, DEPTH), self.dtype),
      'values': plgpu.SMEM(
        (self.stages, self.matrices, DEPTH, widen.COLUMNS), jnp.int8, transforms=widen.LINE
      ),
      'chunk': plgpu.SMEM(out, self.dtype, transforms=ring.transforms(self.dtype)),
      **ring.barriers(self.stages, 1 + self.matrices),
    }
    if self.gathered:
      scratch |= gather.scratch(self.aim, self.stages, self.rows)
    scratch |= widen.scratch(self.aim, self.dtype)
    return scratch | ring.turned_scratch(self.aim, self.dtype, (DEPTH, self.part))


class _Block:
  """What one thread block does."""

  def __init__(self, plan: _Plan, given, out, scratch):
    self.plan, self.out, self.scratch = plan, out, scratch
    self.expert, self.used, self.lhs, self.values, self.scale = given[:5]
    self.index = given[-1]
    self.ring = ring.Ring(plan.stages, scratch['full'], scratch['empty'])

  def run(self):
    self.mine = ring.count(self.used[0] * self.plan.column_tiles, self.plan.aim.blocks)
    ring.specialise(self.fill, self.consume, 'gather' if self.plan.gathered else 'copy')

  def place(self, i):
    """Tile of rows, tile of columns, and expert of this block's work item i."""
    index = jax.lax.axis_index('sm') + i * self.plan.aim.blocks
    m, n = raster(index, self.used[0], self.plan.column_tiles)
    return m, n, self.expert[m]

  def fill(self):
    landed = None
    if self.plan.gathered:
      landed = lambda slot, pending: gather.wait(self.plan.aim, pending, self.landed(slot))
    start = lambda i: (self.place(i), jnp.int32(self.plan.inner // DEPTH))
    ring.fill(self.ring, self.mine, start, self.load, landed)

  def landed(self, slot):
    return self.scratch['landed'].at[slot] if 'landed' in self.scratch else None

  def load(self, tile, k, slot):
    m, n, e = tile
    plan, full = self.plan, self.scratch['full'].at[slot]
    row, depth, stage = m * plan.rows, k * DEPTH, self.scratch['lhs'].at[slot]
    if plan.gathered:
      gather.start(plan.aim, self.lhs, self.index, row, depth, stage, self.landed(slot))
    else:
      box = self.lhs.at[pl.ds(row, plan.rows), pl.ds(depth, DEPTH)]
      plgpu.copy_gmem_to_smem(box, stage, full)
    for half in range(plan.matrices):
      columns = pl.ds(n * plan.columns + half * widen.COLUMNS, widen.COLUMNS)
      box = self.values.at[e, pl.ds(depth, DEPTH), columns]
      plgpu.copy_gmem_to_smem(box, self.scratch['values'].at[slot, half], full)

  def consume(self, wg):
    """The products of `wg`'s columns, or of its rows."""
    plan = self.plan
    half = wg if plan.matrices == CONSUMERS else 0

    def visit(i, step):
      def with_accumulator(acc):
        return self.multiply(acc, half, wg, step), acc[...]

      shape = plgpu.ACC((widen.COLUMNS, plan.part), jnp.float32)
      step, acc = pl.run_scoped(with_accumulator, shape)
      self.write(acc, i, half, wg)
      return step

    jax.lax.fori_loop(jnp.int32(0), self.mine, visit, jnp.int32(0))

  def multiply(self, acc, half, wg, step):
    """One tile; returns the step after the last one.

    The widened weights are overwritten by the next ones, so that each product is waited for. Meanwhile the other
    warpgroup widens.
    """
    plan, spare = self.plan, self.scratch.get('spare')

    def visit(_, step):
      slot = jax.lax.rem(step, jnp.int32(plan.stages))
      plgpu.barrier_wait(self.ring.full.at[slot])
      stage, kinds = self.scratch['values'].at[slot, half], (plan.kind, plan.dtype)
      weights = widen.operand(plan.aim, stage, *kinds, self.scratch.get('widened'), wg)
      rows = self.scratch['lhs'].at[slot]
      if plan.matrices == 1:
        rows = self.scratch['lhs'].at[slot, pl.ds(wg * plan.part, plan.part)]
      plgpu.wgmma(acc, weights, ring.turned(rows, spare, wg))
      plgpu.wgmma_wait(0)
      plgpu.barrier_arrive(self.ring.empty.at[slot])
      return step + 1

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(plan.inner // DEPTH), visit, step)

  def write(self, acc, i, half, wg):
    plan, chunk = self.plan, self.scratch['chunk'].at[wg]
    m, n, e = self.place(i)
    column = n * plan.columns + half * widen.COLUMNS
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    widen.store(plan.aim, acc, self.scale, e, column, chunk)
    plgpu.commit_smem()
    row = m * plan.rows + (wg * plan.part if plan.matrices == 1 else 0)
    box = self.out.at[pl.ds(row, plan.part), pl.ds(column, widen.COLUMNS)]
    plgpu.copy_smem_to_gmem(chunk, box)
