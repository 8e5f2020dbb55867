"""The kernel benchmark: its routings, and a race of two turns."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from scripts.bench_advice import advice
from tests.conftest import ROOT


@pytest.fixture(scope='module')
def bench():
  spec = importlib.util.spec_from_file_location(
    'bench_kernels', ROOT / 'scripts' / 'bench_kernels.py'
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize('name', ('small', 'small-skewed'))
def test_tokens_choose_distinct_experts_and_half_of_them_the_hot_one_where_skewed(bench, name):
  shape = bench.SHAPES[name]
  expert = bench.choose_experts(shape).reshape(shape.tokens, shape.choices)
  assert all(len(set(row)) == shape.choices for row in expert.tolist())
  first_half = (expert[: shape.tokens // 2] == 0).any(axis=1).mean()
  fair = shape.choices / shape.experts
  assert first_half == 1 if shape.skewed else abs(first_half - fair) < 0.1
  assert abs((expert[shape.tokens // 2 :] == 0).any(axis=1).mean() - fair) < 0.1


def test_a_race_reports_each_body_and_why_others_do_not_take_part(bench, tmp_path, capsys):
  out = tmp_path / 'result.json'
  assert (
    bench.main(['--shapes', 'small', '--only', 'pack', '--rounds', '2', '--out', str(out)]) == 0
  )
  rows = {row['implementation']: row for row in json.loads(out.read_text())['rows']}
  assert rows.keys() == {'blocks', 'cpu', 'gpu', 'tpu'}
  refused = {name: row['refused'] for name, row in rows.items() if 'refused' in row}
  assert refused == {'gpu': 'needs a GPU', 'tpu': 'needs a TPU'}
  out = capsys.readouterr().out
  assert rows['cpu']['milliseconds'] > 0 and 'does not take part' in out
  assert out.splitlines()[-1] == 'expert_ffn was not timed here: nothing to set'


@pytest.mark.parametrize('operation', ('quantised_matmul', 'quantised_matmul_e4m3'))
def test_weights_of_eight_bits_are_raced_without_a_gradient(bench, operation):
  shape = bench.Shape('few rows', 8, 128, 128, 4, 2)
  programs, refused, op = bench.contestants(operation, shape, np.dtype('float32'))
  assert programs.keys() == {'blocks', 'cpu'} and refused.keys() == {'gpu', 'tpu'}
  assert all(parts.keys() == {'forward'} for parts in programs.values())
  assert op.flops == 2 * 16 * 128 * 128 and op.arguments[1].nbytes == 4 * 128 * 128


def test_a_rival_that_fails_is_no_failure(bench, monkeypatch):
  """torch and Triton are looked for where their operation is raced, and nowhere else."""

  def fail(arguments):
    raise RuntimeError('out of memory\nand more')

  rival = types.SimpleNamespace(contestants=fail)
  monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: name)
  monkeypatch.setattr(bench.importlib, 'import_module', {'bench_triton': rival}.get)
  assert bench.in_torch('expert_ffn', ()) == ({}, {'triton': 'out of memory'})
  assert bench.in_torch('pack', ()) == ({}, {})
  monkeypatch.setattr(
    bench.importlib.util, 'find_spec', lambda name: None if name == 'triton' else name
  )
  assert bench.in_torch('expert_ffn', ()) == ({}, {})


@pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in ('torch', 'triton')),
  reason='needs torch and triton (pip install torch triton)',
)
def test_the_layer_in_triton_is_right_in_its_own_simulation():
  env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
  command = [sys.executable, 'scripts/bench_triton.py']
  done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and done.stdout.count('float32') == 6, done.stdout + done.stderr


def test_a_body_that_cannot_is_no_failure(bench, monkeypatch):
  def refuse(name, *args):
    raise bench.Unsupported('no such widths')

  operation = bench.Operation(('blocks',), (np.ones(2),), 0, refuse, {}, 0)
  monkeypatch.setitem(bench.OPERATIONS, 'pack', lambda shape, dtype: operation)
  programs, refused, _ = bench.contestants('pack', bench.SHAPES['small'], np.dtype('float32'))
  assert not programs and refused == {'blocks': 'no such widths'}


def timed(shape, **milliseconds):
  """Rows of bodies that took so long, a third of it forward; a text says why a body takes no part."""
  common = dict(operation='expert_ffn', shape=shape)
  for name, took in milliseconds.items():
    if isinstance(took, str):
      yield dict(**common, implementation=name, refused=took)
    else:
      for direction, share in (('forward', took / 3), ('backward', 2 * took / 3)):
        yield dict(**common, implementation=name, direction=direction, milliseconds=share)


def test_the_last_line_says_what_to_set():
  faster = [*timed('A', blocks=60, gpu=12, ragged_dot=1), *timed('C', blocks=90, gpu=45)]
  assert advice(faster, 'cuda').endswith(
    'at A gpu is 5.00 times as fast as blocks; at C gpu is 2.00 times as fast as blocks: '
    'train with --config.model.moe.implementation=gpu'
  )
  mixed = [*faster, *timed('B', blocks=8, gpu=9)]
  assert advice(mixed, 'cuda').endswith(
    'at B blocks is the fastest: set model.moe.implementation by the shape nearest to yours'
  )
  refused = [*timed('A', blocks=60, gpu='float32', tpu='needs a TPU')]
  assert advice(refused, 'cuda').endswith(
    "at A blocks is the fastest; at A gpu takes no part (float32): model.moe.implementation='auto' takes the fastest"
  )
  assert advice([*timed('A', cpu=1, blocks=2)], 'cpu').endswith("'auto' takes the fastest")
  assert 'was not timed here' in advice([], 'cuda')
