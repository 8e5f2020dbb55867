"""The operations that Pallas' interpreter lacks, and what stands for them there.

The interpreter (jax 0.11.2 and 0.12.0) has neither `plgpu.mma` nor copies without a barrier. A simulated kernel has
the same tiles, ring, bounds and stores; its products are `jnp.dot`, its copies complete a barrier a stage.
"""

import contextlib
import contextvars
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu

from .. import chips
from ..registry import Unsupported

plgpu: Any = mosaic_gpu  # that of jax 0.10, which type checkers may see, has less

WARPS = 2  # of the four, along the rows of a tile; the others share out the columns
COPIES = 2  # of a stage


class Hardware:
  """What compiles to cp.async, ldmatrix and mma.sync."""

  def scratch(self, stages: int) -> dict:
    """Shared memory that tells when a stage has landed: none, the threads count their own copies."""
    return {}

  def copy(self, source, stage, landed):
    """Starts to copy a matrix of global memory to a stage."""
    plgpu.copy_gmem_to_smem(source, stage, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

  def wait(self, pending: int, landed):
    """Returns once all but the last `pending` stages have landed, for every thread; and all have read what they had."""
    plgpu.wait_gmem_to_smem(COPIES * pending)

  def zeros(self, shape, dtype):
    """An accumulator for products of `dtype`."""
    layout = plgpu.Layout.MMA_ACC(dtype, m_warps=WARPS)
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)

  def left(self, ref, *, turned: bool = False, inside=None):
    """The left operand in registers, the transpose of what lies there if `turned`.

    `inside`: (first, end) of the contracted positions to take; zeros stand for the others.
    """
    layout = plgpu.Layout.MMA_LHS(ref.dtype, m_warps=WARPS)
    values = plgpu.load(ref.transpose((1, 0)) if turned else ref, layout=layout)
    if inside is None:
      return values
    position = plgpu.broadcasted_iota(jnp.int32, values.shape, 1, layout=layout)
    return _kept(values, position, inside)

  def right(self, ref, *, turned: bool = False, inside=None, position=None):
    """The same for the right operand.

    `position`: `numbered`, in global memory. An iota of this layout counts both rows of a register as the first of
    them (jax 0.11.2, 0.12.0).
    """
    layout = plgpu.Layout.MMA_RHS(ref.dtype, m_warps=WARPS)
    values = plgpu.load(ref.transpose((1, 0)) if turned else ref, layout=layout)
    if inside is None:
      return values
    number = plgpu.load(position.transpose((1, 0)), layout=layout, optimized=False)
    return _kept(values, number, [edge.astype(ref.dtype) for edge in inside])

  def multiply(self, acc, left, right):
    """`acc + left @ right`."""
    return plgpu.mma(acc, left, right)

  def rows(self, ref):
    """A multiple of 16 rows in registers, 16 bytes of a row together."""
    layout = plgpu.Layout.SMEM_GMEM_COPY(ref.shape, ref.dtype, 128)
    return plgpu.load(ref, layout=layout, optimized=False)


class Simulation(Hardware):
  """The same for the interpreter."""

  def scratch(self, stages):
    return {'landed': plgpu.Barrier(num_arrivals=COPIES, num_barriers=stages)}

  def copy(self, source, stage, landed):
    plgpu.copy_gmem_to_smem(source, stage, landed)

  def wait(self, pending, landed):
    plgpu.barrier_wait(landed)
    plgpu.commit_smem()  # bulk copies, which these are here, see what threads did only after a fence

  def zeros(self, shape, dtype):
    return jnp.zeros(shape, jnp.float32)

  def multiply(self, acc, left, right):
    return acc + jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32))

  def rows(self, ref):
    return ref[...]

  def left(self, ref, *, turned=False, inside=None):
    values = ref[...].T if turned else ref[...]
    if inside is None:
      return values
    return _kept(values, jax.lax.broadcasted_iota(jnp.int32, values.shape, 1), inside)

  def right(self, ref, *, turned=False, inside=None, position=None):
    values = ref[...].T if turned else ref[...]
    if inside is None:
      return values
    return _kept(values, position[...].T, [edge.astype(ref.dtype) for edge in inside])


def numbered(rows: int, columns: int, dtype):
  """The number of each row of a matrix in all its columns, `[columns, rows]`; types of 16 bits hold up to 256."""
  return jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32), (columns, rows)).astype(dtype)


def _kept(values, position, inside):
  kept = (position >= inside[0]) & (position < inside[1])
  return jnp.where(kept, values, jnp.zeros_like(values))


HARDWARE = Hardware()
_MACHINE: contextvars.ContextVar[Hardware] = contextvars.ContextVar('machine', default=HARDWARE)


def current(operation: str) -> Hardware:
  """The machine of kernels that are traced now.

  Raises:
    Unsupported: this jax has no matrix product for it.
  """
  machine = _MACHINE.get()
  if machine is HARDWARE and not hasattr(plgpu, 'mma'):
    raise Unsupported(
      f"{operation}: implementation='ampere' needs jax 0.11 or newer, whose Pallas has "
      f'plgpu.mma, not jax {jax.__version__}'
    )
  return machine


@contextlib.contextmanager
def simulated():
  """Kernels traced inside run in Pallas' GPU interpreter, which looks for races; fresh memory holds NaN.

  For tests: what is compiled inside must not be used outside, nor the reverse, since jit does not see the difference.
  """
  from ..hopper import compat

  token = _MACHINE.set(Simulation())
  try:
    with chips.simulated(), compat.interpreter():
      yield
  finally:
    _MACHINE.reset(token)
