"""The program that answers what to train: the rows of the published table, budgets, fits, and bad input."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments.errors import BadInput
from experiments.optimal import amount, main, size

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNITS = {'k': 1e3, 'M': 1e6, 'B': 1e9, 'T': 1e12}


def number(text):
  return float(text[:-1]) * UNITS[text[-1]]


def ask(capsys, *flags):
  """The rows that the program prints, as dicts of texts, and the whole text."""
  assert main(['optimal', *flags]) == 0
  text = capsys.readouterr().out
  lines = text.splitlines()
  head = next(index for index, line in enumerate(lines) if line.split()[:2] == ['E', 'G'])
  names = lines[head].split()
  rows = [
    dict(zip(names, line.split(), strict=True)) for line in lines[head + 1 :] if line[:1] == ' '
  ]
  return rows, text


# Krajewski et al. 2024, table 2
@pytest.mark.parametrize(
  'flops, active, tokens, grain, loss',
  [
    ('2.95e18', 100e6, 4.37e9, '8', 3.133),
    ('1.93e20', 1e9, 28.94e9, '16', 2.491),
    ('1.41e21', 3e9, 72.90e9, '16', 2.245),
    ('6.46e21', 7e9, 137.60e9, '32', 2.076),
    ('4.16e23', 70e9, 941.07e9, '32', 1.694),
    ('5.69e24', 300e9, 2.96e12, '64', 1.503),
    ('4.97e25', 1e12, 7.94e12, '64', 1.367),
  ],
)
def test_the_best_choice_is_the_row_of_the_published_table(
  capsys, flops, active, tokens, grain, loss
):
  rows, text = ask(capsys, '--law', 'fine_grained', '--flops', flops)
  best = rows[0]
  assert (best['E'], best['G']) == ('64', grain)
  assert number(best['active']) == pytest.approx(active, rel=0.05)
  assert number(best['tokens']) == pytest.approx(tokens, rel=0.05)
  assert float(best['loss']) == pytest.approx(loss, abs=0.03)
  assert best['margin'] == '+0.0000'
  margins = [float(row['margin']) for row in rows]
  assert margins == sorted(margins)
  assert margins[1] > 0
  assert 'Krajewski' in text


def test_a_dense_model_is_among_the_choices(capsys):
  rows, _ = ask(capsys, '--flops', '1e20', '--granularity', '1,16')
  dense = next(row for row in rows if row['E'] == '1')
  assert dense['active'] == dense['total']
  assert float(dense['margin']) > 0.3


def test_memory_and_inference_change_the_joint_choice(capsys):
  flags = ('--law', 'joint', '--flops', '1e22', '--experts', '1,2,4,8,16,32')
  free, _ = ask(capsys, *flags)
  limited, text = ask(capsys, *flags, '--memory', '24GB')
  served, _ = ask(capsys, *flags, '--memory', '24GB', '--inference_tokens', '1e11')
  assert free[0]['E'] == '32'
  assert limited[0]['E'] == '4'
  assert '24.0GB' in text
  assert all(float(row['memory'].removesuffix('GB')) <= 24.0 for row in limited)
  assert float(served[0]['loss']) > float(limited[0]['loss']) > float(free[0]['loss'])


def test_chinchilla_has_one_choice(capsys):
  rows, _ = ask(capsys, '--law', 'chinchilla', '--flops', '5.76e23')
  assert len(rows) == 1
  assert number(rows[0]['active']) == pytest.approx(72e9, rel=0.03)


@pytest.mark.parametrize(
  'flags, sentence',
  [
    ([], 'required: --flops'),
    (['--flops', '0'], "'0' is not accepted: it must be a number more than 0"),
    (['--flops', '1e20x'], 'must be a number'),
    (['--flops', '1e400'], 'must be a number'),
    (['--flops', '1e20', '--memory', '80'], 'must be a size such as 80GB'),
    (['--flops', '1e20', '--experts', '0,1'], 'must be integers from 1'),
    (['--flops', '1e20', '--experts', '8'], 'accepted are 1, 16 and 64'),
    (['--flops', '1e20', '--law', 'clark'], 'has no training tokens'),
    (['--flops', '1e20', '--law', 'inference_optimal'], 'no published coefficients'),
    (['--flops', '1e20', '--law', 'joint', '--granularity', '2'], 'does not know it'),
    (['--flops', '1e20', '--law', 'chinchilla', '--experts', '2'], 'does not know it'),
    (['--flops', '1e20', '--memory', '0.001GB'], 'accepted are larger budgets'),
    (['--flop', '1e20'], '--flops'),
    (['--flops', '1e20', '--fit', 'nowhere.json'], 'nowhere.json cannot be read'),
  ],
)
def test_bad_input_is_one_sentence(flags, sentence):
  with pytest.raises(BadInput) as error:
    main(['optimal', *flags])
  assert sentence in str(error.value)
  assert '\n' not in str(error.value)
  assert error.value.exit_code == 2


FIT = {
  'law': 'chinchilla',
  'size': 'N',
  'fixed': {'E': 1, 'G': 1},
  'coefficients': {},
  'draws': [],
  'rows': [],
  'runs': 9,
}


@pytest.mark.parametrize(
  'change, sentence',
  [
    ({'law': 'kaplan'}, "of law 'kaplan': accepted are chinchilla, clark, fine_grained"),
    ({'law': ['joint']}, 'accepted are chinchilla'),
    ({'size': None, 'rows': None}, 'is not a fit.json of experiments.fit: no size, rows$'),
    ({}, 'is not a fit.json of experiments.fit: KeyError'),
  ],
)
def test_a_json_that_is_no_fit_is_refused(change, sentence, tmp_path):
  file = tmp_path / 'fit.json'
  record = {key: value for key, value in {**FIT, **change}.items() if value is not None}
  file.write_text(json.dumps(record))
  with pytest.raises(BadInput, match=sentence):
    main(['optimal', '--flops', '1e20', '--fit', str(file)])


@pytest.mark.parametrize(
  'value, text',
  [(999.4, '999'), (1e9, '1.00B'), (28.18e9, '28.2B'), (999.6e6, '1.00B'), (2.957e12, '2.96T')],
)
def test_amounts_have_three_digits(value, text):
  assert amount(value) == text


def test_bytes_have_a_unit():
  assert [size(value) for value in (24e9, 3.456e12, 5e6)] == ['24.0GB', '3.46TB', '5.00MB']


def test_the_program_needs_neither_jax_nor_scipy():
  """Apart from the package's own face: a program that answers in a second cannot import them first."""
  code = """
import sys, types
package = types.ModuleType('moejax')
package.__path__ = ['moejax']
sys.modules['moejax'] = package
from experiments.optimal import main
main(['optimal', '--flops', '1e20'])
print(sorted({'jax', 'flax', 'scipy', 'matplotlib'} & set(sys.modules)))
"""
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout.splitlines()[-1] == '[]', done.stderr
