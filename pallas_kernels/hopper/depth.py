"""Sums over the rows of each expert: the kernel of every product with a ragged contraction (gradients of weights)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..compat import struct_like, vary_like
from . import compat, gather, ring, store, target
from .compat import pl, plgpu
from .layout import DEPTH, Layout
from .target import Target
from .tiles import columns_of

ROWS = 128  # of an output tile, half of them a warpgroup's
STAGES = 4


def run(name, left, right, layout: Layout, results, *, gathered=None, index=None):
  """`out_i[e] = left[rows of e].T @ right_i[rows of e]`; zeros for experts without rows.

  Padding rows must be zero in both operands. Every step of DEPTH rows lies within one expert's tiles.

  Args:
    name: of the kernel in profiles.
    left: `[P, D]` in the padded layout.
    right: `[P, n * F]`: n matrices side by side.
    results: (n, type of the results).
    gathered: 'left' or 'right' when that operand is `[R, ...]`, whose rows `index [P]` are taken, zeros for -1.

  Returns n arrays `[E, D, F]`.
  """
  aim, (num_results, out_dtype) = target.current(), results
  if gathered == 'left':
    left, index = gather.prepare(aim, left, index)
  elif gathered == 'right':
    right, index = gather.prepare(aim, right, index)
  num_experts, height, width = layout.first.shape[0], left.shape[1], right.shape[1] // num_results
  plan = _Plan(aim, left.dtype, out_dtype, num_experts, height, width, num_results, gathered)
  inputs = [layout.first, layout.steps, left, right, *([] if gathered is None else [index])]

  def body(*refs, **scratch):
    _Block(plan, refs[: len(inputs)], refs[len(inputs) :], scratch).run()

  out = struct_like((num_experts, height, width), out_dtype, left)
  kernel = compat.kernel(
    body,
    out_type=[out] * num_results,
    scratch=plan.scratch(),
    grid=aim.blocks,
    name=name,
    approximate=False,
  )
  return [vary_like(out, left) for out in kernel(*inputs)]


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Static facts of a kernel."""

  aim: Target
  dtype: Any
  out_dtype: Any
  num_experts: int
  height: int
  width: int
  results: int
  gathered: str | None

  @property
  def columns(self) -> int:
    return columns_of(self.width)

  @property
  def row_tiles(self) -> int:
    return self.height // ROWS

  @property
  def column_tiles(self) -> int:
    """Of one result."""
    return self.width // self.columns

  @property
  def per_expert(self) -> int:
    return self.row_tiles * self.column_tiles * self.results

  def scratch(self) -> dict:
    return {
      'left': ring.stages((STAGES, DEPTH, ROWS), self.dtype),
      'right': ring.stages((STAGES, DEPTH, self.columns), self.dtype),
      'chunks': store.scratch(self.out_dtype),
      **ring.barriers(STAGES, 2),
      **({} if self.gathered is None else gather.scratch(self.aim, STAGES, DEPTH)),
      **ring.turned_scratch(self.aim, self.dtype, (64, DEPTH)),
    }


class _Block:
  """What one thread block does."""

  def __init__(self, plan: _Plan, given, out, scratch):
    self.plan, self.out, self.scratch = plan, out, scratch
    self.first, self.steps, self.left_in, self.right_in = given[:4]
    self.index = given[-1]
    self.left, self.right, self.full = (scratch[name] for name in ('left', 'right', 'full'))
    self.ring = ring.Ring(STAGES, self.full, scratch['empty'])

  def run(self):
    total = jnp.int32(self.plan.num_experts * self.plan.per_expert)
    self.mine = ring.count(total, self.plan.aim.blocks)
    ring.specialise(self.fill, self.consume, 'gather' if self.plan.gathered else 'copy')

  def place(self, i):
    """Expert, tile of rows, tile of columns over all results; tiles of rows change fastest."""
    item = jax.lax.axis_index('sm') + i * self.plan.aim.blocks
    e = jax.lax.div(item, jnp.int32(self.plan.per_expert))
    rest = item - e * self.plan.per_expert
    n = jax.lax.div(rest, jnp.int32(self.plan.row_tiles))
    return e, rest - n * self.plan.row_tiles, n

  def fill(self):
    plan, landed = self.plan, None
    if plan.gathered:
      landed = lambda slot, pending: gather.wait(plan.aim, pending, self.landed(slot))
    ring.fill(self.ring, self.mine, self.start, self.load, landed)

  def landed(self, slot):
    return self.scratch['landed'].at[slot] if 'landed' in self.scratch else None

  def start(self, i):
    e, m, n = self.place(i)
    return (self.first[e], m, n), self.steps[e]

  def load(self, tile, k, slot):
    first, m, n = tile
    row = pl.multiple_of(first + k * DEPTH, DEPTH)
    self.load_side('left', self.left_in, row, m * ROWS, slot)
    self.load_side('right', self.right_in, row, n * self.plan.columns, slot)

  def load_side(self, side, source, row, column, slot):
    stage = self.scratch[side].at[slot]
    if side == self.plan.gathered:
      aim, landed = self.plan.aim, self.landed(slot)
      gather.start(aim, source, self.index, row, column, stage, landed)
    else:
      box = source.at[pl.ds(row, DEPTH), pl.ds(column, stage.shape[1])]
      plgpu.copy_gmem_to_smem(box, stage, self.full.at[slot])

  def consume(self, wg):
    spare, shape = self.scratch.get('spare'), (ROWS // ring.CONSUMERS, self.plan.columns)

    def visit(i, step):
      e, m, n = self.place(i)

      def with_accumulator(acc):
        def product(slot):
          half = self.left.at[slot, :, pl.ds(wg * shape[0], shape[0])]
          plgpu.wgmma(acc, ring.turned(half, spare, wg), self.right.at[slot])

        return ring.multiply(self.ring, step, self.steps[e], product), acc[...]

      step, acc = pl.run_scoped(with_accumulator, plgpu.ACC(shape, jnp.float32))
      self.write(acc, e, m * ROWS + wg * shape[0], n, wg)
      return step

    jax.lax.fori_loop(jnp.int32(0), self.mine, visit, jnp.int32(0))

  def write(self, acc, e, row, n, wg):
    which = jax.lax.div(n, jnp.int32(self.plan.column_tiles))
    for i, out in enumerate(self.out):

      @pl.when(which == i)
      def _(i=i, out=out):
        column = (n - i * self.plan.column_tiles) * self.plan.columns
        store.Writer(self.scratch['chunks'], wg).write_all(acc, out.at[e], row, column)
