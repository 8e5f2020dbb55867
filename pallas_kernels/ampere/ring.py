"""A ring of stages in shared memory that one warpgroup fills with asynchronous copies while it multiplies."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .machine import Hardware
from .tiles import STAGES


def stages(shape: tuple[int, int], dtype):
  """Shared memory for STAGES matrices, in tiles of 8 rows and at most 128 bytes, swizzled as ldmatrix wants them."""
  width = min(shape[1], 64)
  line = width * jnp.dtype(dtype).itemsize
  transforms = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(line))
  return plgpu.SMEM((STAGES, *shape), dtype, transforms=transforms)


class Ring(NamedTuple):
  """Two operands a stage.

  Attributes:
    machine: what copies and waits.
    left: `[STAGES, ...]`.
    right: `[STAGES, ...]`.
    landed: a barrier a stage, where simulated.
  """

  machine: Hardware
  left: jax.Array
  right: jax.Array
  landed: jax.Array | None

  def contract(self, steps, load: Callable, product: Callable, acc, *, edges: bool):
    """Adds up `steps` products, with the copies of the next two under way.

    Args:
      steps: how many; it may be 0.
      load: `load(k)` gives the two matrices of global memory that step k multiplies.
      product: `product(left, right, k, acc, edge)` gives the next accumulator from two stages.
      acc: the accumulator to begin with.
      edges: `edge` shall be True for the first step too, besides the last two.
    """
    ahead = STAGES - 1
    for k in range(ahead):

      @pl.when(k < steps)
      def _(k=k):
        self._start(load, jnp.int32(k))

    def visit(more, edge):
      def step(k, acc):
        slot = jax.lax.rem(k, jnp.int32(STAGES))
        landed = None if self.landed is None else self.landed.at[slot]
        self.machine.wait(ahead - 1 if more else 0, landed)
        if more:
          self._start(load, k + ahead)
        return product(self.left.at[slot], self.right.at[slot], k, acc, edge)

      return step

    full = jnp.maximum(steps - ahead, 0).astype(jnp.int32)
    first = jnp.minimum(full, 1) if edges else jnp.int32(0)
    if edges:
      acc = jax.lax.fori_loop(jnp.int32(0), first, visit(True, True), acc)
    acc = jax.lax.fori_loop(first, full, visit(True, False), acc)
    return jax.lax.fori_loop(full, steps, visit(False, True), acc)

  def _start(self, load, k):
    slot = jax.lax.rem(k, jnp.int32(STAGES))
    landed = None if self.landed is None else self.landed.at[slot]
    for source, stage in zip(load(k), (self.left, self.right), strict=True):
      self.machine.copy(source, stage.at[slot], landed)
