"""Every TPU body through the TPU's own compiler: no chip is needed, only libtpu (`.ci/aot` installs it).

With --full-matrix the programs that compile for minutes too. Each topology compiles in a process of its own, for libtpu
stays loaded. It proves that blocks are legal, that what a step needs fits in on-chip memory, and that nothing is copied
on the way into a kernel. It says nothing of speed.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.pallas_kernels import tpu_programs

pytestmark = [
  pytest.mark.aot,
  pytest.mark.slow,
  pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed'),
]


@pytest.fixture(scope='module', params=('v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'))
def report(request):
  """What tpu_programs.py says of each program on one topology."""
  options = ['--full-matrix'] if request.config.getoption('--full-matrix') else []
  done = subprocess.run(
    [sys.executable, '-m', 'tests.pallas_kernels.tpu_programs', request.param, *options],
    # Several processes may load libtpu: none of them touches a chip.
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def pytest_generate_tests(metafunc):
  if 'program' in metafunc.fixturenames:
    programs = tpu_programs.programs(metafunc.config.getoption('--full-matrix'))
    metafunc.parametrize('program', programs, ids=lambda program: program.name)


def test_it_compiles_calls_its_kernels_and_copies_nothing(report, program):
  found = report[program.name]
  assert found['kernels'] == sorted(program.kernels)
  assert found['temporary_bytes'] < program.temporary_mib * tpu_programs.MIB, found
