"""Studies: what is read off a sweep's table and curves."""

import json
import math
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.errors import BadInput, RunsFailed
from experiments.studies import expert_choice, fine_grained, rows, seeds, soft_moe, soft_throughput
from experiments.studies.multiplicity import experts_by_token
from moejax import Assignment

TABLE = """key,name,status,seed,eval_loss,model.moe.router,G,seconds
51e097846213,one,finished,1,2.5,"{""name"": ""top_k"", ""k"": 2}",1,30
b,two,finished,0,2.0,"{""name"": ""top_k"", ""k"": 2}",1,30
c,three,finished,0,3.0,"{""name"": ""soft""}",2,60
d,four,diverged,1,,"{""name"": ""soft""}",2,60
"""


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'table.csv').write_text(TABLE)
  return tmp_path


def test_values_come_in_the_order_of_their_seeds(folder):
  table = rows.read(folder)
  assert rows.by_seed(table, 'eval_loss', rows.router_is(name='top_k', k=2)) == [2.0, 2.5]
  assert fine_grained.of_granularity(table[:3], 2) == [3.0]
  assert rows.minutes(table) == 3.0
  assert 'eval_loss' not in table[3]
  assert table[0]['key'] == '51e097846213'  # the name of a folder, not a number


def test_two_runs_of_one_seed_are_refused(folder):
  with pytest.raises(BadInput, match=r'seeds \[0, 0, 1\]'):
    rows.by_seed(rows.read(folder)[:3], 'eval_loss', lambda row: True)
  with pytest.raises(BadInput, match='0 rows'):
    rows.by_seed(rows.read(folder), 'eval_loss', lambda row: False)


def test_a_sweep_that_is_not_finished_is_refused(folder):
  (folder / 'table.csv').write_text(TABLE.replace('c,three,finished', 'c,three,failed'))
  with pytest.raises(BadInput, match="1 runs are not finished, the first is 'three'"):
    rows.read(folder)
  with pytest.raises(BadInput, match='run the sweep'):
    rows.read(folder / 'nowhere')


def test_steps_to_a_loss_are_read_off_the_straight_lines_between_evaluations():
  curve = [(25, 4.0), (50, 3.0), (75, 2.5), (100, 2.75)]
  assert expert_choice.steps_to(curve, 3.5) == 37.5
  assert expert_choice.steps_to(curve, 2.75) == 62.5
  assert expert_choice.steps_to(curve, 2.5) == 75
  assert math.isnan(expert_choice.steps_to(curve, 2.4))


def test_experts_of_a_token_are_its_rows_that_were_kept():
  assignment = Assignment(
    token=jnp.array([0, 0, 2, 2, 1]),
    expert=jnp.array([1, 3, 0, 4, 4]),  # 4: dropped
    weight=jnp.ones(5),
    chosen=jnp.array([1, 3, 0, 0, 0]),
    num_experts=4,
  )
  np.testing.assert_array_equal(experts_by_token(assignment, 4), [2, 0, 1, 0])


def test_the_best_granularity_is_that_of_the_lowest_mean_loss():
  def row(granularity, seed, loss):
    size = {'model.d_model': 64, 'steps': 10, 'flops': 1e9 * granularity}
    return size | {'G': granularity, 'seed': seed, 'eval_loss': loss}

  losses = {1: (3.0, 3.2), 2: (2.9, 2.7), 4: (2.6, 2.9), 8: (3.0, 3.0)}
  table = [row(g, seed, loss) for g, both in losses.items() for seed, loss in enumerate(both)]
  (line,) = fine_grained.best_granularities(table)
  assert line['best_granularity'] == 4
  assert line['gain_over_1'] == pytest.approx(3.1 - 2.75)
  assert line['flops'] == 4e9


def test_a_claim_about_accuracy_goes_the_way_of_the_larger_number():
  accuracy = {name: [90.0, 91.0, 92.0] for name in soft_moe.arms()} | {'soft': [95.0, 96.1, 97.2]}
  first, *_ = soft_moe.claims(accuracy)
  assert first.measured == pytest.approx(5.1)
  assert first.verdict == 'reproduced'


def test_flat_is_less_than_fifteen_percent_beyond_two_deviations():
  def times(*ratios):
    return {
      what: {1: [2.0] * 3, 8: [2.0 * r for r in ratios]}
      for what in ('forward', 'both passes', 'update')
    }

  found = soft_throughput.claims({4: times(1.04, 1.05, 1.06), 2: times(1.0, 1.15, 1.3)})
  assert [one.verdict for one in found] == ['not reproduced'] * 2 + ['reproduced'] * 3
  assert found[2].measured == pytest.approx(0.10)
  (slow, *_) = soft_throughput.claims({4: times(1.5, 1.5, 1.5)})
  assert slow.verdict == 'opposite'
  assert '| 4 | forward | 2000.0 | 2100.0 | 1.05 |' in soft_throughput.page(
    {4: times(1.04, 1.05, 1.06)}
  )


@pytest.mark.usefixtures('standard_promotion')
def test_layers_of_any_number_of_experts_are_timed_in_turns(monkeypatch):
  for name, value in (('SLOTS', 4), ('WIDTH', 8), ('HIDDEN', 8)):
    monkeypatch.setattr(soft_throughput, name, value)
  found = soft_throughput.measure(2, experts=(1, 4), rounds=2)
  assert [*found] == ['forward', 'both passes', 'update']
  assert all([*of] == [1, 4] for of in found.values())
  assert all(len(one) == 2 for of in found.values() for one in of.values())


def test_a_record_of_seeds_says_what_their_last_evaluations_were(tmp_path):
  folders = []
  for seed, (loss, accuracy, took) in enumerate(
    ((2.0, 0.4, 90.0), (2.2, 0.5, 99.0), (2.4, 0.3, 91.0))
  ):
    folder = tmp_path / str(seed)
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({'seed': seed}))
    (folder / 'program.json').write_text(json.dumps({'seconds': took}))
    first = {'step': 9, 'loss': 5.0}
    last = {'step': 19, 'loss': 2.5, 'eval_loss': loss, 'eval_accuracy': accuracy}
    (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, (first, last))) + '\n')
    folders.append(folder)
  seeds.record(Path('configs/tiny.py'), folders, tmp_path / 'out')
  result = json.loads((tmp_path / 'out' / 'result.json').read_text())
  assert [run['seed'] for run in result['runs']] == [0, 1, 2]
  assert seeds.measured(result) == (
    'evaluation loss 2.200 (s.d. 0.200) nats, accuracy 40.0 (s.d. 10.0) %'
  )
  assert seeds.seconds(result) == '91 s'
  page = (tmp_path / 'out' / 'README.md').read_text()
  assert 'After 20 steps: evaluation loss 2.200' in page
  assert result['command'] in page
  assert (tmp_path / 'out' / 'plot.png').read_bytes().startswith(b'\x89PNG')


def test_a_program_that_fails_ends_the_record(tmp_path, monkeypatch):
  monkeypatch.setattr(seeds, 'RUNS', tmp_path)
  with pytest.raises(RunsFailed, match='missing.py, seed 0: the program ended with 2'):
    seeds.train(tmp_path / 'missing.py', 0)
  with pytest.raises(BadInput, match='usage'):
    seeds.main(['seeds'])


@pytest.mark.parametrize('told', [0, 2])
def test_a_program_that_a_signal_stopped_is_not_recorded_as_finished(tmp_path, monkeypatch, told):
  """It ends in order, with 0, and its folder is that of a run that goes on."""

  def stopped(command, **_):
    folder = Path(command[command.index('--workdir') + 1])
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps({'steps': 3}))
    lines = [{'step': step, 'loss': 1.0} for step in range(told)]
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return subprocess.CompletedProcess(command, 0)

  monkeypatch.setattr(seeds, 'RUNS', tmp_path)
  monkeypatch.setattr(seeds.subprocess, 'run', stopped)
  with pytest.raises(RunsFailed, match=f'stopped after its line of step {told} of 3'):
    seeds.train(Path('configs/tiny.py'), 0)
  assert not (tmp_path / 'tiny' / '0' / 'program.json').exists()
