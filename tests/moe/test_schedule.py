"""Chunks of an exchange in the schedule that the TPU's own compiler makes: no chip is needed, only libtpu."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from tests.compilers import libtpu
from tests.conftest import ROOT

pytestmark = [
  pytest.mark.aot,
  pytest.mark.slow,
  pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed'),
]
ASYNCHRONOUS = {'xla_tpu_enable_async_all_to_all': 'true'}


def schedule(options, compiler, *more, topology='v5p:2x2x1'):
  """What tpu_schedule.py says of an exchange between four chips; a process of its own, for libtpu stays loaded."""
  arguments = [topology, json.dumps(options), json.dumps(compiler), *more]
  done = subprocess.run(
    [sys.executable, '-m', 'tests.moe.tpu_schedule', *arguments],
    # Several processes may load libtpu: none of them touches a chip.
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope='module')
def chunks():
  """Rows of two chunks go there and back."""
  found = schedule({'chunks': 2}, ASYNCHRONOUS)
  assert len(found['transfers']) == 4
  return found


def test_rows_of_the_second_chunk_travel_while_experts_work_on_the_first(chunks):
  """In the order of the schedule: products stand between start and end of the second transfer there."""
  assert ['dot_general' in between for between in chunks['transfers']][1]


def test_outputs_of_the_first_chunk_travel_while_experts_work_on_the_second(chunks):
  assert ['dot_general' in between for between in chunks['transfers']][2]
  # and routing sends nothing: XLA:CPU alone gathers the logits
  assert all('shard_map' in source for source in chunks['sources'])


def test_no_work_hides_the_first_way_there_and_the_last_way_back(chunks):
  overlapped = ['dot_general' in between for between in chunks['transfers']]
  assert overlapped == [False, True, True, False]


@pytest.mark.parametrize(
  ('options', 'compiler'),
  [({'chunks': 1}, ASYNCHRONOUS), ({'chunks': 2}, {})],
  ids=['one chunk', 'without the option of the compiler'],
)
def test_nothing_overlaps_without_chunks_or_asynchronous_transfers(options, compiler):
  """Of one chunk compilers before libtpu 0.0.50 leave one of the two ways in one piece, all do without the option."""
  found = schedule(options, compiler)['transfers']
  cut = 2 if libtpu() >= (0, 0, 50) else 1
  assert len(found) == (cut if compiler else 0)
  assert not any('dot_general' in between for between in found)


@pytest.mark.parametrize(('chunks', 'overlapped', 'transfers'), [(1, 0, 4), (2, 4, 7)])
def test_rows_and_gradients_travel_beside_products_in_both_passes(chunks, overlapped, transfers):
  """Of two chunks a transfer stays in one piece, and the first and last ones of the passes are waited for."""
  found = schedule({'chunks': chunks}, ASYNCHRONOUS, 'gradient')['transfers']
  assert len(found) == transfers
  assert ['dot_general' in between for between in found].count(True) == overlapped


@pytest.mark.parametrize('topology', ('v5p:2x2x1', 'v6e:2x2'))
def test_a_layer_whose_rows_travel_in_its_kernels_compiles_with_its_gradients(topology):
  """Experts over two devices, their width over two others, so that weights are gathered again for the gradients."""
  kernels = ('exchange_matmul', 'exchange_matmul_drhs', 'matmul_exchange')
  found = schedule({'kernel': 'tpu'}, {}, 'gradient', topology=topology)
  assert found['kernels'] == sorted(2 * kernels)
