"""The kernel benchmark: its routings, and a race of two turns."""

import importlib.util
import json

import numpy as np
import pytest

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
  assert rows.keys() == {'blocks', 'cpu', 'tpu'} and rows['tpu']['refused'] == 'needs a TPU'
  assert rows['cpu']['milliseconds'] > 0 and 'does not take part' in capsys.readouterr().out


def test_a_body_that_cannot_is_no_failure(bench, monkeypatch):
  def refuse(name, *args):
    raise bench.Unsupported('no such widths')

  operation = bench.Operation(('blocks',), (np.ones(2),), 0, refuse, {}, 0)
  monkeypatch.setitem(bench.OPERATIONS, 'pack', lambda shape, dtype: operation)
  programs, refused, _ = bench.contestants('pack', bench.SHAPES['small'], np.dtype('float32'))
  assert not programs and refused == {'blocks': 'no such widths'}
