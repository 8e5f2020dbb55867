"""A ring of stages in shared memory: one warpgroup fills them, two multiply what they hold.

The ring lives as long as the block, so the loads of the next output tile overlap the epilogue of the last one.
Loads complete `full`, consumers arrive at `empty` one step late: by then the tensor cores have read the stage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .compat import pl, plgpu

CONSUMERS = 2  # warpgroups that multiply; the third one loads
# What a block of three warpgroups gets at its start, and so all that `set_max_registers` may share out: asking for
# more would wait for ever.
REGISTERS = 3 * 168
LOADER_REGISTERS = {'copy': 40, 'gather': 56}


class Ring(NamedTuple):
  """Barriers of `stages` stages.

  Attributes:
    full: completed when all loads of a stage have arrived.
    empty: completed when both consumers have read a stage.
  """

  stages: int
  full: Any
  empty: Any


def transforms(dtype, width: int = 64):
  """Tiles of 8 rows, swizzled: what wgmma reads and bulk copies write; `width` columns are contiguous."""
  line = width * jnp.dtype(dtype).itemsize
  return (
    plgpu.TilingTransform((8, width)),
    plgpu.SwizzleTransform(line),
  )


def stages(shape: tuple[int, ...], dtype):
  """Shared memory for operands of wgmma, matrices of the last two axes."""
  return plgpu.SMEM(shape, dtype, transforms=transforms(dtype))


def barriers(stages: int, loads: int) -> dict:
  """Scratch of a ring of which each stage is filled by `loads` arrivals."""
  return {
    'full': plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
    'empty': plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
  }


def specialise(load: Callable, consume: Callable, loads: str):
  """Shares out the warpgroups and the registers; `consume(wg)` for each consumer.

  `loads`: 'copy', or 'gather' whose addresses take more registers.
  """
  wg, few = jax.lax.axis_index('wg'), LOADER_REGISTERS[loads]

  @pl.when(wg == CONSUMERS)
  def _():
    plgpu.set_max_registers(few, action='decrease')
    load()

  @pl.when(wg < CONSUMERS)
  def _():
    plgpu.set_max_registers((REGISTERS - few) // CONSUMERS, action='increase')
    consume(wg)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # shared memory goes away with the block


def count(extent: jax.Array, blocks: int) -> jax.Array:
  """How many of `extent` work items this block has: those congruent to its index."""
  mine = jax.lax.axis_index('sm')
  return jax.lax.div(extent - mine + (blocks - 1), jnp.int32(blocks))


def fill(ring: Ring, tiles: Any, depth: Callable, load: Callable, landed=None, after=None):
  """The loading warpgroup: `load(tile, k, slot)` for every step of every tile.

  `depth(i)` gives the tile's handle and number of steps. With `landed(pending)`, loads are completed by software:
  it returns once at most `pending` of the last loads are outstanding, and the stage of the load before them is then
  handed over. `after(i, tile)` follows the loads of a tile.
  """
  lag = ring.stages - 2
  slot_of = lambda step: jax.lax.rem(step, jnp.int32(ring.stages))

  def hand_over(step, pending):
    landed(slot_of(step), pending)
    plgpu.commit_smem()
    plgpu.barrier_arrive(ring.full.at[slot_of(step)])

  def visit_tile(i, step):
    tile, steps = depth(i)

    def visit_step(k, step):
      @pl.when(step >= ring.stages)
      def _():
        plgpu.barrier_wait(ring.empty.at[slot_of(step)])

      load(tile, k, slot_of(step))
      if landed is not None:

        @pl.when(step >= lag)
        def _():
          hand_over(step - lag, lag)

      return step + 1

    step = jax.lax.fori_loop(jnp.int32(0), steps, visit_step, step)
    if after is not None:
      after(i, tile)
    return step

  total: Any = jax.lax.fori_loop(jnp.int32(0), tiles, visit_tile, jnp.int32(0))
  if landed is not None:
    # All that is left lands before the first of it is handed over.
    begin: Any = jnp.maximum(total - lag, 0)

    @pl.loop(begin, total)
    def _(step):
      hand_over(step, 0)

  first: Any = jnp.maximum(total - ring.stages, 0)

  @pl.loop(first, total)
  def _(step):
    plgpu.barrier_wait(ring.empty.at[slot_of(step)])


def multiply(ring: Ring, step: jax.Array, steps, product: Callable, products: int = 1):
  """One tile of a consuming warpgroup: `product(slot)` starts `products` wgmma; returns the step after the last one."""

  def visit_step(k, step):
    slot = jax.lax.rem(step, jnp.int32(ring.stages))
    plgpu.barrier_wait(ring.full.at[slot])
    product(slot)
    plgpu.wgmma_wait(products)

    @pl.when(k > 0)
    def _():
      plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(step - 1, jnp.int32(ring.stages))])

    return step + 1

  step = jax.lax.fori_loop(jnp.int32(0), steps, visit_step, step)
  plgpu.wgmma_wait(0)

  @pl.when(steps > 0)
  def _():
    plgpu.barrier_arrive(ring.empty.at[jax.lax.rem(step - 1, jnp.int32(ring.stages))])

  return step


def turned_scratch(aim, dtype, shape) -> dict:
  """Room for `turned` operands of that shape: none on hardware."""
  if aim.transposes:
    return {}
  return {'spare': plgpu.SMEM((CONSUMERS, *shape), dtype)}  # the interpreter wants no swizzle


def turned(ref, spare, wg):
  """The transpose of a matrix in shared memory, as an operand of wgmma; a copy where the interpreter needs it."""
  if spare is None:
    return ref.transpose((1, 0))
  spare[wg] = ref[...].T
  plgpu.commit_smem()
  return spare.at[wg]
