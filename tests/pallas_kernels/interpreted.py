"""Runs TPU bodies on a CPU: each memory access is checked, and fresh memory holds NaN."""

import contextlib

from pallas_kernels import chips


@contextlib.contextmanager
def interpreted(implementation):
  """A context in which `implementation` runs here: the TPU's interpreter for 'tpu', else nothing.

  Reads out of bounds raise, copies happen when they are waited for, and races between them are looked for.
  """
  if implementation != 'tpu':
    yield
    return
  from jax.experimental.pallas import tpu as pltpu

  params = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode='on_wait', uninitialized_memory='nan'
  )
  with chips.simulated(), pltpu.force_tpu_interpret_mode(params):
    yield


def parametrize_cases(metafunc, every, chosen):
  """Gives a test that wants `case` those of `chosen`; with --full-matrix the whole table `every`."""
  if 'case' in metafunc.fixturenames:
    full = metafunc.config.getoption('--full-matrix')
    metafunc.parametrize('case', every if full else chosen, ids=lambda case: case.name)
