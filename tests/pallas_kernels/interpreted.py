"""Runs TPU bodies on a CPU: each memory access is checked, and fresh memory holds NaN."""

import contextlib
import importlib
import itertools
from unittest import mock

import pytest

from pallas_kernels import chips
from tests.thorough import unless


@contextlib.contextmanager
def interpreted(implementation, cores=1):
  """A context in which `implementation` runs here: the TPU's interpreter for 'tpu', else nothing.

  Reads out of bounds and races are errors; copies happen when they are waited for. `cores` share out a grid's parallel
  axes, each with a memory of its own.
  """
  if implementation != 'tpu':
    yield
    return
  from jax.experimental.pallas import tpu as pltpu

  params = pltpu.InterpretParams(
    detect_races=True,
    dma_execution_mode='on_wait',
    uninitialized_memory='nan',
    num_cores_or_threads=cores,
  )
  with chips.simulated(), pltpu.force_tpu_interpret_mode(params), races_raise():
    yield


def races_raise():
  """Of the versions of jax before 0.12, which only print the races that they find."""
  module = importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call')

  class Strict(module.RaceDetectionState):
    def __setattr__(self, name, value):
      super().__setattr__(name, value)
      if name == 'races_found' and value:
        raise RuntimeError('the interpreter found a race')

  return mock.patch.object(module, 'RaceDetectionState', Strict)


def cases_of_bodies(cases, bodies, usual):
  """Parameters (case, body): the TPU's body, which is interpreted, has in the default suite the `usual` cases alone."""
  return [
    pytest.param(
      case, body, marks=unless(body != 'tpu' or case.name in usual), id=f'{case.name}-{body}'
    )
    for body, case in itertools.product(bodies, cases)
  ]


def parametrize_cases(metafunc, every, chosen):
  """Gives a test that wants `case` those of `chosen`; with --full-matrix the whole table `every`."""
  if 'case' in metafunc.fixturenames:
    full = metafunc.config.getoption('--full-matrix')
    metafunc.parametrize('case', every if full else chosen, ids=lambda case: case.name)
