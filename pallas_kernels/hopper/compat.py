"""What differs between the versions of Pallas Mosaic GPU (jax 0.10.2 to 0.12), and nothing else."""

import contextlib
import importlib
from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Whether the interpreter knows transposed operands of wgmma, and layouts of registers: both came with its public name.
INTERPRETER_TRANSPOSES = INTERPRETER_PLACES = hasattr(plgpu, 'InterpretGPUParams')


def _private(name: str) -> Any:
  """A module of the interpreter: its parameters are public from 0.11 on, what it found is not."""
  return importlib.import_module(f'jax._src.pallas.mosaic_gpu.interpret.{name}')


def kernel(body, *, out_type, scratch, grid, name, approximate, warpgroups=3):
  """`plgpu.kernel` with `warpgroups` on axis 'wg' and `grid` blocks on axis 'sm'."""
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=(grid,),
    grid_names=('sm',),
    num_threads=warpgroups,
    thread_name='wg',
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(
      approx_math=approximate,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
      reduction_scratch_bytes=0,  # sums over columns stay within a warp
    ),
  )


@contextlib.contextmanager
def interpreter():
  """Kernels traced and run inside run on the CPU, with the semantics of the GPU: threads, barriers, memories.

  Raises:
    RuntimeError: two threads touched the same memory without a barrier between them.
  """
  module: Any = plgpu if INTERPRETER_TRANSPOSES else _private('params')
  state = _private('interpret_pallas_call')
  try:
    params = module.InterpretGPUParams(detect_races=True, uninitialized_memory='nan')
    with module.force_gpu_interpret_mode(params):
      yield
    # Its state outlives the run; jax before 0.12 only prints the races that it finds.
    if state.get_races().races_found:
      raise RuntimeError('the interpreter found a race')
  finally:
    state.reset_gpu_interpret_mode_state()


__all__ = ['INTERPRETER_PLACES', 'INTERPRETER_TRANSPOSES', 'interpreter', 'kernel', 'pl', 'plgpu']
