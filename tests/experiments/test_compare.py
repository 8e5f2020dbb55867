"""Comparisons: equal work, equal seeds, and a difference only beyond two standard deviations."""

import csv
import json
import shlex
from pathlib import Path

import pytest

from experiments import compare
from experiments.errors import BadInput, StorageError

ROOT = Path(__file__).resolve().parents[2]
RUNS = """grid(
    {'model.moe.router': ({'name': 'top_k', 'k': 1}, {'name': 'switch'}), 'seed': (0, 1, 2)}
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
  assert {line['seeds'] for line in lines} == {'3'}
  assert all(0 < float(line['load_entropy']) <= 1 for line in lines)
  assert float(lines[0]['dropped']) == 0 < float(lines[1]['dropped'])
  page = (tmp_path / 'out' / 'README.md').read_text()
  assert (
    compare.page_table([json.loads(json.dumps(line)) for line in compare_lines(tmp_path)]) in page
  )
  assert shlex.quote(override) in page  # without it the command would train other models
  assert (tmp_path / 'out' / 'plot.png').stat().st_size > 5000
  assert '`switch`' in capsys.readouterr().out


def test_listed_runs_are_not_trained(tmp_path, monkeypatch, capsys, make_sweep):
  monkeypatch.chdir(tmp_path)
  compare.main(['compare.py', f'--config={make_sweep(RUNS)}', '--workdir=runs', '--list'])
  assert len(capsys.readouterr().out.splitlines()) == 6
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
  first = [row(1000, seed, loss) for seed, loss in enumerate((2.0, 2.1, 2.2))]
  losses = (1.0, 1.1, 1.2)
  own = lambda active: [row(active, seed, loss) for seed, loss in enumerate(losses)]
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


def test_a_label_names_the_router_and_its_options():
  assert compare.label(row(1, name='top_k', k=2)) == 'top_k k=2'
  assert compare.label({'model.moe.layers': 'none'}) == 'dense model'
