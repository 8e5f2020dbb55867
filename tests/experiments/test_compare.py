"""Comparisons: equal work, equal seeds, and a difference only beyond two standard deviations."""

import csv
import json
import shlex
import types
from pathlib import Path

import pytest
from flax import nnx

from configs.compare import lm_tiny, vision_tiny
from experiments import compare
from experiments.errors import BadInput, StorageError
from moejax import make_router, router_names

ROOT = Path(__file__).resolve().parents[2]
RUNS = """grid(
    {'model.moe.router': ({'name': 'top_k', 'k': 1}, {'name': 'switch'}), 'seed': (0, 1)}
  )"""


def test_a_comparison_trains_every_router_and_writes_one_table_and_one_figure(
  tmp_path, monkeypatch, capsys, make_sweep
):
  monkeypatch.chdir(ROOT)
  file = make_sweep(RUNS)
  arguments = [f'--config={file}', f'--workdir={tmp_path / "runs"}', f'--out={tmp_path / "out"}']
  override = "--config.model.moe.losses={'z': 0.001}"
  compare.main(['compare.py', *arguments, '--workers=1', override])
  with (tmp_path / 'out' / 'comparison.csv').open() as stream:
    lines = list(csv.DictReader(stream))
  assert [line['router'] for line in lines] == ['top_k k=1', 'switch']
  assert {line['seeds'] for line in lines} == {'2'}
  assert all(0 < float(line['load_entropy']) <= 1 for line in lines)
  assert float(lines[0]['dropped']) == 0 < float(lines[1]['dropped'])
  page = (tmp_path / 'out' / 'README.md').read_text()
  assert (
    compare.page_table([json.loads(json.dumps(line)) for line in compare_lines(tmp_path)]) in page
  )
  assert shlex.quote(override) in page  # without it the command would train other models
  assert (tmp_path / 'out' / 'plot.png').stat().st_size > 5000
  assert '`switch`' in capsys.readouterr().out
  check_a_router_is_added(file, tmp_path, override)


def check_a_router_is_added(file, tmp_path, override):
  """To a record of two, without their runs: one as it was written, one whose losses by seed were not kept."""
  record, before = tmp_path / 'out' / 'result.json', compare_lines(tmp_path)
  two = "{'name': 'switch'})"
  file.write_text(file.read_text().replace(two, two[:-1] + ", {'name': 'thor'})"))
  result = json.loads(record.read_text())
  del result['routers'][1]['losses']
  result['routers'][1]['verdict'] = 'as it was'
  record.write_text(json.dumps(result))
  arguments = [f'--config={file}', f'--add_to={record.parent}', '--workers=1', override]
  compare.main(['compare.py', *arguments, f'--workdir={tmp_path / "more"}'])
  first, second, third = compare_lines(tmp_path)
  assert (first, second) == (before[0], result['routers'][1])
  assert third['router'] == 'thor'
  assert third['verdict'] == compare.verdict(first['losses'], third['losses'])
  trained = {path.name for path in (tmp_path / 'more').iterdir() if path.is_dir()}
  assert trained == set(third['runs'])
  page = (record.parent / 'README.md').read_text()
  assert 'Of 1 of the 3 routers the losses of single seeds are not recorded' in page


def test_equal_loads_of_a_pyramid_have_the_whole_entropy(tmp_path):
  """Narrower layers are logged at the width of the widest, with zeros that are nobody's."""
  line = {'step': 1, 'time': {'tokens_per_second': 1.0}, 'load': [[1, 1, 0, 0], [1, 1, 1, 1]]}
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(line) + '\n')
  config = tmp_path / 'config.json'
  moe = {'pyramid': '1,2', 'granularity': 2}
  config.write_text(json.dumps({'model': {'moe': moe}}))
  assert compare.last_metrics(tmp_path)['load_entropy'] == pytest.approx(1.0)
  config.write_text(json.dumps({'model': {'moe': {**moe, 'pyramid': ''}}}))
  assert compare.last_metrics(tmp_path)['load_entropy'] == pytest.approx(0.75)


def test_nothing_is_compared_with_a_router_without_losses_by_seed():
  lines = [
    {'router': 'a', 'N_active': 1},
    {'router': 'b', 'N_active': 1, 'losses': [1.0, 1.1, 1.2]},
  ]
  with pytest.raises(BadInput, match='router a, .* take its entry out of result.json'):
    compare.judge(lines)
  assert compare.judge(lines[:1]) == lines[:1]


def test_a_folder_without_a_recorded_comparison_is_refused_before_training(
  tmp_path, monkeypatch, make_sweep
):
  monkeypatch.chdir(tmp_path)
  arguments = [f'--config={make_sweep(RUNS)}', '--workdir=runs', '--add_to=record']
  with pytest.raises(BadInput, match='--add_to=record: accepted is the folder of a recorded'):
    compare.main(['compare.py', *arguments])
  assert not (tmp_path / 'runs').exists()


def test_a_recorded_router_of_other_runs_is_trained_again():
  def run(name, key):
    return types.SimpleNamespace(changes={'model.moe.router': {'name': name}}, key=key)

  before = {'routers': [{'router': name, 'runs': ['1', '2']} for name in ('a', 'b', 'c')]}
  before['routers'].append({'router': 'd'})
  runs = [run('a', '2'), run('a', '1'), run('b', '1'), run('b', '3'), run('d', '5')]
  assert list(compare.still_recorded(runs, before)) == ['a']


def test_listed_runs_are_not_trained(tmp_path, monkeypatch, capsys, make_sweep):
  monkeypatch.chdir(tmp_path)
  compare.main(['compare.py', f'--config={make_sweep(RUNS)}', '--workdir=runs', '--list'])
  assert len(capsys.readouterr().out.splitlines()) == 4
  assert not (tmp_path / 'runs').exists()


def test_a_folder_for_the_table_that_cannot_be_made_is_refused_before_training(
  tmp_path, monkeypatch, make_sweep
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'file').write_text('')
  arguments = [f'--config={make_sweep(RUNS)}', '--workdir=runs', '--out=file/out']
  with pytest.raises(StorageError, match='--out=file/out cannot be made: Not a directory'):
    compare.main(['compare.py', *arguments])
  assert not (tmp_path / 'runs').exists()


def test_a_run_that_diverged_after_an_evaluation_is_refused():
  fine = {'name': 'a', 'status': 'finished', 'seed': 0, 'eval_loss': 2.0}
  for broken in ({'eval_loss': 2.1}, {'eval_loss': float('nan')}, {}):
    row = {'name': 'b', 'status': 'diverged', 'seed': 1, **broken}
    with pytest.raises(BadInput, match='b diverged: take it out'):
      compare.by_router([fine, row])


def compare_lines(tmp_path):
  return json.loads((tmp_path / 'out' / 'result.json').read_text())['routers']


@pytest.mark.parametrize(
  'own, said',
  [
    ([1.9, 2.0, 2.1], 'better'),
    ([2.9, 3.0, 3.1], 'no difference'),
    ([2.0, 3.0, 4.5], 'no difference'),
    ([3.9, 4.1, 4.0], 'worse'),
    ([3.0, 3.1], 'too few seeds'),
  ],
)
def test_a_difference_needs_two_standard_deviations_of_three_seeds(own, said):
  assert compare.verdict([2.9, 3.0, 3.1][: len(own)], own) == said


def row(active, seed=0, loss=1.0, **router):
  return {
    'name': 'x',
    'seed': seed,
    'N_active': active,
    'eval_loss': loss,
    'model.moe.router': router,
  }


def test_nothing_is_claimed_of_a_router_with_other_active_parameters():
  first = {'N_active': 1000, 'losses': [2.0, 2.1, 2.2]}
  own = lambda active: {'N_active': active, 'losses': [1.0, 1.1, 1.2]}
  assert compare.judged(first, own(1010)) == 'better'
  assert compare.judged(first, own(1100)) == '1.10 times the active parameters'
  assert compare.judged(first, own(900)) == '0.90 times the active parameters'


def test_routers_of_unlike_seeds_or_without_a_loss_are_refused():
  with pytest.raises(BadInput, match=r'router b has seeds \[1\] and others \[0\]'):
    compare.by_router([row(1, name='a'), row(1, seed=1, name='b')])
  without = row(1, name='a')
  del without['eval_loss']
  with pytest.raises(BadInput, match='x diverged'):
    compare.by_router([without])


@pytest.mark.parametrize('config', [lm_tiny, vision_tiny], ids=['lm_tiny', 'vision_tiny'])
def test_every_router_is_compared_or_named_as_left_out(config):
  compared = {arm[0]['name'] for arm in config.ARMS}
  assert compared | set(config.LEFT_OUT) == set(router_names())
  assert not compared & set(config.LEFT_OUT)


def test_a_router_left_out_of_language_models_is_not_for_them():
  for name in lm_tiny.LEFT_OUT:
    flags = make_router(name, d_model=8, num_experts=4, rngs=nnx.Rngs(0)).flags
    assert flags.needs or not flags.prefix_safe, name


def test_a_label_names_the_router_and_its_options():
  assert compare.label(row(1, name='top_k', k=2)) == 'top_k k=2'
  assert compare.label({'model.moe.layers': 'none'}) == 'dense model'
