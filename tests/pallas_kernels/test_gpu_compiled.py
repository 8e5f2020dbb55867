"""The Hopper bodies compiled to sm_90a machine code, without a GPU: what they ask of the multiprocessor.

Needs the wheels of the extra aot_cuda (`.ci/aot` installs them into an environment of their own) and ptxas of
CUDA 13 (on PATH or in /usr/local/cuda). That a kernel compiles so proves no ordering of memory and no speed.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.aot

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = 'tests/pallas_kernels/aot/compile_for_h200.py'
WARPGROUP, REGISTERS, SHARED_MEMORY = 128, 65536, 227 * 1024
ROUTING = {'rank', 'top_k'}  # of one warpgroup; kernels that multiply have three
WHOLE_LAYER = {
  'expert_ffn_up',
  'expert_ffn_down',
  'expert_ffn_dh',
  'expert_ffn_dx',
  'expert_ffn_dw_into',
  'expert_ffn_dw_down',
}


def missing() -> str | None:
  """Why nothing can be compiled here."""
  if importlib.util.find_spec('jax_plugins') is None or not importlib.util.find_spec(
    'jax_plugins.xla_cuda13'
  ):
    return 'jax-cuda13-plugin is not installed (extra aot_cuda)'
  if not shutil.which('ptxas') and not pathlib.Path('/usr/local/cuda/bin/ptxas').exists():
    return 'no ptxas, neither on PATH nor in /usr/local/cuda/bin'
  return None


def facts(script: str, folder: pathlib.Path, *names: str) -> list[dict]:
  """What a script that compiles kernels prints of each; in a process of its own, which dumps into the folder."""
  if (reason := missing()) is not None:
    pytest.skip(reason)
  env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, script, str(folder), *names],
    cwd=ROOT,
    env=env | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
  """Facts by (program, kernel)."""
  rows = facts(SCRIPT, tmp_path_factory.mktemp('kernels'))
  return {(row['program'], row['kernel']): row for row in rows}


def kernels_of(kernels, program):
  return {name: row for (of, name), row in kernels.items() if of == program}


def test_every_kernel_of_forward_and_backward_is_compiled(kernels):
  for program in ('layer fine', 'layer coarse plain', 'layer decode'):
    assert set(kernels_of(kernels, program)) == WHOLE_LAYER
  assert set(kernels_of(kernels, 'layer contiguous')) == {'expert_ffn_up', 'expert_ffn_down'}
  for program in ('matmul gathered', 'matmul contiguous'):
    assert set(kernels_of(kernels, program)) == {'grouped_matmul', 'grouped_matmul_drhs'}
  for program in ('routing fine', 'routing most'):
    assert set(kernels_of(kernels, program)) == ROUTING


def test_nothing_is_spilled_and_everything_fits_a_multiprocessor(kernels):
  for name, row in kernels.items():
    assert row['stack'] == 0 and row['spills'] and not any(row['spills']), (name, row)
    threads = WARPGROUP if name[1] in ROUTING else 3 * WARPGROUP
    assert row['registers'] * threads <= REGISTERS, (name, row)
    assert row['shared memory'] <= SHARED_MEMORY, (name, row)
    assert not row['serialised'], (name, row)


def test_warpgroups_do_not_wait_for_registers_that_nobody_gives(kernels):
  """What the loader keeps and the two consumers take is at most what a block has at its start."""
  for name, row in kernels.items():
    if name[1] in ROUTING:
      assert not row['shares']
      continue
    loader, consumer = sorted(row['shares'])
    assert loader + 2 * consumer <= 3 * row['registers'], (name, row)


def test_products_are_as_wide_as_the_tensor_cores_take_them(kernels):
  """64 x 256 per warpgroup; two accumulators of 64 x 128 behind a gate, and 64 x 128 beside saved tiles."""
  for program in ('layer fine', 'layer coarse plain'):
    rows = kernels_of(kernels, program)
    for name in ('expert_ffn_down', 'expert_ffn_dx', 'expert_ffn_dw_into', 'expert_ffn_dw_down'):
      assert rows[name]['products'] == ['m64n256k16'], (program, name)
    assert rows['expert_ffn_dh']['products'] == ['m64n128k16']
  assert kernels_of(kernels, 'layer fine')['expert_ffn_up']['products'] == ['m64n128k16']
  assert kernels_of(kernels, 'layer coarse plain')['expert_ffn_up']['products'] == ['m64n256k16']
  for row in kernels_of(kernels, 'matmul contiguous').values():
    assert row['products'] == ['m64n256k16']


def test_gathered_rows_come_in_pieces_of_16_bytes_and_the_others_by_bulk_copies(kernels):
  gathering = {'expert_ffn_up', 'expert_ffn_dh', 'expert_ffn_dw_into', 'expert_ffn_dw_down'}
  gathering |= {'grouped_matmul', 'grouped_matmul_drhs', 'quantised_matmul'}
  lags = {'quantised 8': 6, 'quantised 32': 6, 'quantised 64': 3, 'quantised 128': 3}
  for (program, name), row in kernels.items():
    assert row['bulk loads'] > 0, (program, name)
    if name in gathering and 'contiguous' not in program:
      assert row['gathers'] and {tuple(g) for g in row['gathers']} == {('cg', '16')}, (
        program,
        name,
      )
      # the ring's lag, and its end
      assert set(row['waits']) == {0, lags.get(program, 2)}, (program, name)
    else:
      assert not row['gathers'] and not row['waits'], (program, name)


def test_where_rows_lie_is_found_without_a_loop_of_launches(kernels):
  """A step of few rows would wait for it longer than for its products."""
  for (program, name), row in kernels.items():
    if name in ('grouped_matmul', 'quantised_matmul'):
      assert row['loops'] == 0, program


@pytest.mark.parametrize(
  ('program', 'rows'), [('8', 16), ('32', 64), ('64', 128), ('128', 128), ('contiguous', 8)]
)
def test_weights_of_eight_bits_are_multiplied_from_registers_by_as_few_rows_as_there_are(
  kernels, program, rows
):
  """The last has tiles of 16 rows, eight a warpgroup. A word of weights is loaded once for all its products."""
  found = kernels_of(kernels, f'quantised {program}')
  assert found.keys() == {'quantised_matmul'}
  row = found['quantised_matmul']
  assert row['products'] == [f'm64n{rows}k16'] and row['left'] == ['registers']
