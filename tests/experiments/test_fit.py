"""The program that fits a law to a table of runs: what it takes, leaves out, writes, draws and refuses."""

import csv
import json
import struct

import numpy as np
import pytest

from experiments import optimal
from experiments.errors import BadInput
from experiments.fit import main
from experiments.sweeps.record import write_table
from experiments.table import read_table
from moejax.scaling import FINE_GRAINED, JOINT
from moejax.scaling.accounting import fine_grained

HEADER = 'name seed N N_active D G E flops eval_loss status model.d_model'.split()


def rows_of(law, experts=(64,), grains=(1, 2, 4, 8), noise=0.003):
  """Runs as of a sweep: four widths x three lengths x granularities x experts."""
  rng = np.random.default_rng(0)
  rows = []
  for d, D, E, G in (
    (d, D, E, G)
    for d in (256, 384, 512, 640)
    for D in (8e9, 16e9, 33e9)
    for E in experts
    for G in grains
  ):
    counts = fine_grained(d, E, G)
    loss = float(law(counts, D, E, G)) + rng.normal(0, noise)
    flops = float(counts.training_flops * D)
    sizes = [int(counts.total), int(counts.active), int(D), G, E, flops]
    rows.append([f'd{d}-D{D:.0e}-G{G}-E{E}', 0, *sizes, loss, 'finished', d])
  return rows


def write(file, rows, header=HEADER):
  with file.open('w', newline='') as stream:
    csv.writer(stream).writerows([header, *rows])
  return file


def by_grain(counts, D, E, G):
  return FINE_GRAINED['E=64'](N=counts.total, D=D, G=G)


def by_experts(counts, D, E, G):
  return JOINT(N=counts.active, D=D, E=E)


def run(*flags):
  return main(['fit', *map(str, flags)])


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """A folder with a fitted table: 48 runs, of which one has failed, one has no loss and one is wild."""
  folder = tmp_path_factory.mktemp('sweep')
  rows = rows_of(by_grain)
  rows[3][8:10] = ['', 'failed']
  rows[5][8] = 'nan'
  rows[7][8] = 9.5
  write(folder / 'table.csv', rows)
  assert run('--runs', folder, '--draws', 12, '--diverged_above', 8) == 0
  return folder


def test_runs_that_did_not_finish_stay_in_the_table_flagged(fitted):
  record = json.loads((fitted / 'fit' / 'fit.json').read_text())
  assert (record['runs'], record['excluded'], len(record['rows'])) == (45, 3, 48)
  reasons = [record['rows'][index]['excluded'] for index in (3, 5, 7)]
  assert reasons == ['failed', 'diverged: loss is not finite', 'diverged: loss is above 8']
  assert record['rows'][3]['eval_loss'] is None
  assert 'predicted' not in record['rows'][3]


def test_the_fit_predicts_the_law_that_made_the_runs(fitted):
  record = json.loads((fitted / 'fit' / 'fit.json').read_text())
  assert record['law'] == 'fine_grained'
  assert record['fixed'] == {'E': 64.0}
  assert record['rmse'] < 0.004
  assert record['held_out_rmse'] < 0.008
  held_out = [row['eval_loss'] for row in record['rows'] if row.get('held_out')]
  others = [row['eval_loss'] for row in record['rows'] if row.get('held_out') is False]
  assert len(held_out) == record['held_out'] == 9
  assert max(held_out) <= min(others)
  for coefficient in record['coefficients'].values():
    assert coefficient['interval'][0] <= coefficient['interval'][1]
  assert len(record['draws']) == 12


def test_plots_are_png_pictures_of_some_size(fitted):
  for name in ('loss_by_flops', 'iso_flops', 'optimum', 'predicted'):
    data = (fitted / 'fit' / f'{name}.png').read_bytes()
    assert data.startswith(b'\x89PNG')
    width, height = struct.unpack('>II', data[16:24])
    assert width > 800
    assert height > 500


def test_what_is_printed_has_coefficients_intervals_and_errors(fitted, capsys, tmp_path):
  assert (
    run('--runs', fitted / 'table.csv', '--out', tmp_path / 'x', '--draws', 3, '--no_plots') == 0
  )
  text = capsys.readouterr().out
  assert (
    'law fine_grained, E=64, N = column N, 46 runs' in text
  )  # the wild run is no longer excluded
  assert 'd256-D8e+09-G8-E64 seed 0 (failed)' in text
  for name in ('a', 'alpha', 'b', 'beta', 'g', 'gamma', 'c'):
    assert f'\n{name} ' in text
  assert ' to ' in text.split('\ngamma ')[1].splitlines()[0]
  assert '9 runs held out' in text
  assert [file.name for file in (tmp_path / 'x').iterdir()] == ['fit.json']


def test_the_fit_can_be_asked_for_the_optimum(fitted, capsys):
  assert optimal.main(['optimal', '--flops', '1.93e20', '--fit', str(fitted / 'fit/fit.json')]) == 0
  lines = capsys.readouterr().out.splitlines()
  best = next(line for line in lines if line.startswith('    64')).split()
  assert best[1] == '16'  # as by the law that made the runs
  assert '45 runs of' in lines[0]
  assert lines[-1].startswith('10th to 90th percentile of 12 resampled fits: E 64 to 64, G ')
  with pytest.raises(BadInput, match='holds a fit of law fine_grained'):
    optimal.main(
      ['optimal', '--flops', '1e20', '--law', 'joint', '--fit', str(fitted / 'fit/fit.json')]
    )


def test_the_joint_law_takes_active_parameters_and_compares_experts(tmp_path, capsys):
  write(tmp_path / 'table.csv', rows_of(by_experts, experts=(1, 2, 4, 8), grains=(1,), noise=1e-4))
  assert run('--runs', tmp_path, '--law', 'joint', '--draws', 2) == 0
  record = json.loads((tmp_path / 'fit/fit.json').read_text())
  assert (record['size'], record['fixed']) == ('N_active', {'G': 1.0})
  assert record['rmse'] < 3e-4
  capsys.readouterr()
  flags = ['--flops', '1e19', '--fit', str(tmp_path / 'fit/fit.json'), '--experts', '1,8']
  assert optimal.main(['optimal', *flags]) == 0
  table = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith('    ')]
  assert [row[0] for row in table] == ['E', '8', '1']


def test_a_law_that_does_not_know_granularity_takes_runs_of_one(tmp_path):
  write(tmp_path / 'table.csv', rows_of(by_grain))
  with pytest.raises(
    BadInput, match=r'does not know G, and the runs have G=1, 2, 4, 8: .* --granularity'
  ):
    run('--runs', tmp_path, '--law', 'chinchilla')
  flags = ('--law', 'chinchilla', '--granularity', 2, '--draws', 0)
  assert run('--runs', tmp_path, *flags) == 0
  record = json.loads((tmp_path / 'fit/fit.json').read_text())
  assert (record['runs'], record['fixed']) == (12, {'E': 64.0, 'G': 2.0})
  assert record['coefficients']['alpha']['interval'] is None
  assert not (tmp_path / 'fit/optimum.png').exists()  # nothing to choose but the size
  assert (tmp_path / 'fit/iso_flops.png').exists()


def test_a_law_without_tokens_is_drawn_without_budgets(tmp_path):
  write(tmp_path / 'table.csv', rows_of(by_experts, experts=(1, 2, 4), grains=(1,)))
  assert run('--runs', tmp_path, '--law', 'clark', '--draws', 2) == 0
  names = sorted(file.name for file in (tmp_path / 'fit').glob('*.png'))
  assert names == ['loss_by_flops.png', 'predicted.png']
  with pytest.raises(BadInput, match='no training tokens to choose'):
    optimal.main(['optimal', '--flops', '1e20', '--fit', str(tmp_path / 'fit/fit.json')])


def test_too_few_runs_are_one_sentence_with_the_number_needed(tmp_path):
  write(tmp_path / 'table.csv', rows_of(by_grain)[:9])
  with pytest.raises(
    BadInput, match='9 runs are too few for FineGrained: .* at least 10 runs'
  ) as error:
    run('--runs', tmp_path)
  assert error.value.exit_code == 2
  assert not (tmp_path / 'fit').exists()


def change(index, column, value):
  def apply(rows):
    rows[index][HEADER.index(column)] = value

  return apply


@pytest.mark.parametrize(
  'apply, sentence',
  [
    (change(2, 'N', 'many'), "row 4: N='many' is not a number"),
    (change(2, 'D', -1), "row 4: D='-1' is not accepted"),
    (change(0, 'status', 'ok'), "row 2: status='ok' is not accepted"),
    (change(0, 'eval_loss', 'low'), "row 2: eval_loss='low' is not a number"),
  ],
)
def test_a_broken_cell_is_named(tmp_path, apply, sentence):
  rows = rows_of(by_grain)[:12]
  apply(rows)
  with pytest.raises(BadInput) as error:
    read_table(write(tmp_path / 'table.csv', rows))
  assert sentence in str(error.value)
  assert '\n' not in str(error.value)


def test_a_run_that_never_finished_may_lack_numbers(tmp_path):
  rows = rows_of(by_grain)[:3]
  rows[1][HEADER.index('flops') :] = ['', '', 'failed', '']
  table = read_table(write(tmp_path / 'table.csv', rows))
  assert [run.excluded for run in table.runs] == ['', 'failed', '']
  assert table.column('flops').shape == (2,)


def test_the_table_of_a_sweep_is_read(tmp_path):
  full = [dict(zip(HEADER, row, strict=True)) for row in rows_of(by_grain)[:2]]
  bare = [{'name': 'late', 'seed': 1, 'status': 'waiting'}, {**full[0], 'status': 'diverged'}]
  write_table([*full, *bare], tmp_path / 'table.csv')
  table = read_table(tmp_path)
  assert [run.excluded for run in table.runs] == ['', '', 'waiting', 'diverged']
  np.testing.assert_allclose(table.column('eval_loss'), [row['eval_loss'] for row in full])


def test_a_table_that_is_missing_or_lacks_columns_is_refused(tmp_path):
  with pytest.raises(BadInput, match='table.csv cannot be read: No such file'):
    run('--runs', tmp_path)
  rows = [row[1:] for row in rows_of(by_grain)]
  write(tmp_path / 'table.csv', rows, HEADER[1:])
  with pytest.raises(BadInput, match='lacks the columns name: it has seed, N'):
    run('--runs', tmp_path)
  write(tmp_path / 'table.csv', [])
  with pytest.raises(BadInput, match='none of these has finished'):
    run('--runs', tmp_path)
