"""What becomes of a tile of products in registers."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import store
from .activations import SLOPES
from .compat import pl, plgpu
from .ring import CONSUMERS, stages
from .tiles import Tiles


class Part(NamedTuple):
  """Where a warpgroup's part of a tile lies.

  Attributes:
    row: its first row.
    half: 1 when it holds the second half of the tile's columns, else 0.
    inner: its first row within the tile.
  """

  tiles: Tiles
  n: Any
  wg: Any
  row: Any
  half: Any
  inner: Any

  @classmethod
  def of(cls, tiles: Tiles, m, n, wg):
    if tiles.halves == 'rows':
      inner = wg * tiles.part[0]
      return cls(tiles, n, wg, m * tiles.rows + inner, 0, inner)
    return cls(tiles, n, wg, m * tiles.rows, wg, 0)

  def column(self, sides: int = 1):
    """The first column of each of `sides` matrices' products."""
    return self.n * (self.tiles.columns // sides) + self.half * (self.tiles.part[1] // sides)


class Store:
  """The products themselves, `[P, width]`."""

  inputs: tuple = ()
  approximate = False

  def __init__(self, width, dtype):
    self.width, self.dtype = width, jnp.dtype(dtype)

  def outputs(self, num_rows, strips):
    """Shapes and types of the results; `strips` parts of the columns lie with different warpgroups."""
    return [((num_rows, self.width), self.dtype)]

  def scratch(self, tiles):
    """Shared memory beside the ring's."""
    return {'chunks': store.scratch(self.dtype)}

  def load(self, i, m, n, tiles, own, scratch):
    """What the loading warpgroup brings for this block's tile i."""

  def drain(self, tiles, scratch):
    """What the loading warpgroup waits for at the end of `tiles` tiles."""

  def store(self, accs, part: Part, own, out, scratch):
    """Writes the results of a warpgroup's part, given the products with each matrix."""
    store.Writer(scratch['chunks'], part.wg).write_all(accs[0], out[0], part.row, part.column())


class Hidden(Store):
  """`act(gate) * up` or `act(up)`, `[P, F]`, and unless `save` is 0 the pre-activations side by side, `[save, n F]`."""

  approximate = True

  def __init__(self, width, dtype, activation, sides, save):
    super().__init__(width, dtype)
    self.activation, self.sides, self.save = SLOPES[activation], sides, save

  def outputs(self, num_rows, strips):
    saved = [((self.save, self.sides * self.width), self.dtype)] if self.save else []
    return super().outputs(num_rows, strips) + saved

  def store(self, accs, part, own, out, scratch):
    writer = store.Writer(scratch['chunks'], part.wg)
    rows = pl.ds(part.row, 64)
    for first in range(0, accs[0].shape[1], writer.width):
      pre = [acc[:, first : first + writer.width] for acc in accs]
      columns = pl.ds(part.column(self.sides) + first, writer.width)
      hidden, _ = self.activation(pre[0])
      writer.write(hidden * pre[1] if self.sides == 2 else hidden, out[0].at[rows, columns])
      for s in range(self.sides if self.save else 0):
        columns = pl.ds(s * self.width + part.column(self.sides) + first, writer.width)
        writer.write(pre[s], out[1].at[rows, columns])


class HiddenGradient(Store):
  """From the gradient of the hidden layer, per unit of a row's weight, to what the backward pass needs.

  Results: the gradients of the pre-activations `[P, n F]`, the hidden layer times the weight `[P, F]` (which the
  gradient of w_down contracts), and `[strips, P]` partial sums of the gradient of the weight,
  <dy w_down^T, hidden> (SonicMoE, arXiv 2512.14080, section 3.2).
  """

  approximate = True

  def __init__(self, width, dtype, activation, sides, pre, weight):
    super().__init__(width, dtype)
    self.activation, self.sides, self.inputs = SLOPES[activation], sides, (pre, weight)

  def outputs(self, num_rows, strips):
    wide = ((num_rows, self.sides * self.width), self.dtype)
    return [wide, *super().outputs(num_rows, strips), ((strips, num_rows), jnp.dtype('float32'))]

  def scratch(self, tiles):
    return {
      **super().scratch(tiles),
      'pre': stages((self.sides, tiles.rows, tiles.columns), self.dtype),
      'weight': plgpu.SMEM((tiles.rows,), jnp.float32),
      'pre_full': plgpu.Barrier(num_arrivals=self.sides + 1),
      'pre_empty': plgpu.Barrier(num_arrivals=CONSUMERS),
      'sums': plgpu.SMEM((CONSUMERS, 64), jnp.float32),
    }

  def load(self, i, m, n, tiles, own, scratch):
    @pl.when(i > 0)
    def _():
      plgpu.barrier_wait(scratch['pre_empty'])

    rows = pl.ds(m * tiles.rows, tiles.rows)
    plgpu.copy_gmem_to_smem(own[1].at[rows], scratch['weight'], scratch['pre_full'])
    for s in range(self.sides):
      columns = pl.ds(s * self.width + n * tiles.columns, tiles.columns)
      box = own[0].at[rows, columns]
      plgpu.copy_gmem_to_smem(box, scratch['pre'].at[s], scratch['pre_full'])

  def drain(self, tiles, scratch):
    @pl.when(tiles > 0)
    def _():
      plgpu.barrier_wait(scratch['pre_empty'])

  def store(self, accs, part, own, out, scratch):
    writer, sums, (acc,) = store.Writer(scratch['chunks'], part.wg), 0, accs
    plgpu.barrier_wait(scratch['pre_full'])
    weight = scratch['weight'][pl.ds(part.inner, 64)]
    for first in range(0, acc.shape[1], writer.width):
      inner = pl.ds(part.half * acc.shape[1] + first, writer.width)
      pre = [scratch['pre'][s, pl.ds(part.inner, 64), inner] for s in range(self.sides)]
      dacc = acc[:, first : first + writer.width]
      sums = sums + self.chunk(writer, dacc, pre, weight, part, part.column() + first, out)
    plgpu.barrier_arrive(scratch['pre_empty'])
    mine = scratch['sums'].at[part.wg]
    mine[...] = jnp.sum(sums, axis=1)
    plgpu.commit_smem()
    strip = part.n * (1 if part.tiles.halves == 'rows' else 2) + part.half
    plgpu.copy_smem_to_gmem(mine, out[2].at[strip, pl.ds(part.row, 64)])

  def chunk(self, writer, dhidden, pre, weight, part, column, out):
    """Writes one chunk of the two wide results; returns the products that the weight's gradient sums."""
    rows, scale = pl.ds(part.row, 64), jax.lax.broadcast_in_dim(weight, dhidden.shape, (0,))
    pre = [p.astype(jnp.float32) for p in pre]
    hidden, slope = self.activation(pre[0])
    dscaled = dhidden * scale
    gradients = [dscaled * slope]
    if self.sides == 2:
      gradients = [gradients[0] * pre[1], dscaled * hidden]
      hidden = hidden * pre[1]
    for s, gradient in enumerate(gradients):
      columns = pl.ds(s * self.width + column, writer.width)
      writer.write(gradient, out[0].at[rows, columns])
    writer.write(hidden * scale, out[1].at[rows, pl.ds(column, writer.width)])
    return dhidden * hidden
