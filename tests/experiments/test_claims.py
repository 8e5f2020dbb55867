"""Claims of papers: the rule of the verdict, the files of a result, and that committed pages are those of the JSON."""

import json
import math

import pytest

from experiments.claims import RESULTS, Claim, compare, main, pages, verdict, write_result
from experiments.claims_page import VERDICTS
from experiments.errors import BadInput

SAID = ('A has a lower loss than B', 'Somebody 2023, table 1', '0.2 lower')


def result(folder, *claims, **extra):
  """A folder as an experiment leaves it."""
  write_result(folder, claims, 'scripts/python -m experiments.train', 'a laptop', 12.5, **extra)
  (folder / 'plot.png').write_bytes(b'png')
  return folder


def test_the_committed_pages_are_those_of_the_json():
  """After a new result: scripts/python -m experiments.claims."""
  for file, text in pages(RESULTS).items():
    assert file.read_text(encoding='utf-8') == text, f'{file} is not of its result.json'


# ---- the verdict -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('worse', 'want'),
  [
    ([1, 2, 3], 'not reproduced'),  # the mean 2 is exactly two deviations of 1
    ([1.001, 2, 3], 'reproduced'),
    ([0.999, 2, 3], 'not reproduced'),
    ([-1, -2, -3], 'not reproduced'),
    ([-1.001, -2, -3], 'opposite'),
    ([0, 0, 0], 'not reproduced'),
    ([1, 1, 1], 'reproduced'),  # no deviation at all
    ([-1, -1, -1], 'opposite'),
    ([100, 101], 'not reproduced'),  # far, and two seeds decide nothing
    ([-100, -101], 'not reproduced'),
  ],
)
def test_the_verdict_needs_two_deviations_and_three_seeds(worse, want):
  """The other side is zero, so that `worse` are the differences by seed."""
  got = compare(*SAID, better=[0.0] * len(worse), worse=worse)
  assert got.verdict == want
  assert got.seeds == len(worse)
  assert got.measured == pytest.approx(sum(worse) / len(worse))


def test_of_accuracies_the_higher_is_better():
  higher, lower = [0.91, 0.92, 0.93], [0.81, 0.82, 0.83]
  assert compare(*SAID, higher, lower, higher_is_better=True).verdict == 'reproduced'
  assert compare(*SAID, higher, lower).verdict == 'opposite'
  assert compare(*SAID, higher, lower).measured == pytest.approx(-0.1)


def test_pairs_take_out_what_seeds_have_in_common():
  """Seeds that differ by 10 hide a difference of 1, unless both runs of a seed are compared."""
  better, worse = [0.0, 10.0, 20.0], [1.1, 11.0, 20.9]
  pairs, apart = (compare(*SAID, better, worse, paired=paired) for paired in (True, False))
  assert pairs.measured == pytest.approx(1)
  assert apart.measured == pytest.approx(1)
  assert pairs.sd == pytest.approx(0.1)  # of 1.1, 1.0 and 0.9, over n - 1
  assert apart.sd == pytest.approx(math.sqrt(100 + 98.01))  # variances of both, over n - 1
  assert (pairs.verdict, apart.verdict) == ('reproduced', 'not reproduced')


def test_groups_of_unequal_size_are_compared_apart_and_count_as_the_smaller():
  got = compare(*SAID, [1.0, 1.0], [2.0, 2.0, 2.0, 2.0], paired=False)
  assert (got.seeds, got.verdict) == (2, 'not reproduced')
  with pytest.raises(ValueError, match='2 and 4 values are not pairs'):
    compare(*SAID, [1.0, 1.0], [2.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize(
  ('values', 'message'),
  [([1.0], '1 seeds have no standard deviation'), ([1.0, math.nan, 2.0], 'finite number')],
)
def test_too_few_or_broken_seeds_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    compare(*SAID, values, [0.0] * len(values))


def test_every_verdict_has_a_case():
  assert {verdict(1, 0, 3), verdict(0, 0, 3), verdict(-1, 0, 3)} == set(VERDICTS)


# ---- the files -------------------------------------------------------------------------------------


def test_a_result_is_a_page_and_a_line_of_the_overview(tmp_path, capsys):
  one = Claim(*SAID, 0.12345, 0.0312, 3, 'reproduced')
  two = Claim('E | F grows', 'Somebody 2024', '1.5', -1234.5, 123.4, 4, 'opposite')
  result(tmp_path / 'first', one, title='The first', note='Ten steps.', runs=[{'loss': 1.5}])
  result(tmp_path / 'second', two)
  (tmp_path / 'bench').mkdir()
  (tmp_path / 'bench' / 'result.json').write_text('{"ratio": 2}')
  (tmp_path / 'bench' / 'README.md').write_text('# bench\n\nHow fast [it](a.md) is. On a laptop.\n')
  assert main(['claims', str(tmp_path)]) == 0
  assert capsys.readouterr().out.count('README.md') == 3
  page = (tmp_path / 'first' / 'README.md').read_text()
  assert page.startswith('# The first\n\nTen steps.\n\n| claim |')
  assert (
    '| A has a lower loss than B | Somebody 2023, table 1 | 0.2 lower | 0.123 ± 0.031 | 3 |' in page
  )
  assert '```sh\nscripts/python -m experiments.train\n```' in page
  assert '12.5 minutes in all on a laptop.' in page
  assert page.endswith('![plot](plot.png)\n')
  assert json.loads((tmp_path / 'first' / 'result.json').read_text())['runs'] == [{'loss': 1.5}]
  text = (tmp_path / 'README.md').read_text()
  assert '2 claims of papers: 1 reproduced, 0 not reproduced, 1 opposite.' in text
  assert r'| [second](second/README.md) | E \| F grows | 1.5 | -1230 ± 120 | 4 | opposite |' in text
  assert '| [bench](bench/README.md) | How fast it is |' in text
  assert (tmp_path / 'bench' / 'README.md').read_text().startswith('# bench')


def test_a_page_that_was_edited_by_hand_is_found(tmp_path):
  folder = result(tmp_path / 'one', Claim(*SAID, 1.0, 0.0, 1, 'reproduced'))
  text = pages(tmp_path)[folder / 'README.md']
  assert (folder / 'README.md').read_text() == text
  assert text.replace('| 1 |', '| 2 |') != text


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'claims': []}, 'must be a list of claims'),
    ({'claims': {'a': 1}}, 'must be a list of claims'),
    ({'claims': ['lower']}, 'claim 0 has .* accepted are exactly claim, measured'),
    ({'claims': [{'claim': 'A'}]}, 'claim 0 has claim: accepted are exactly'),
    ({'command': ' '}, "command=' ' is not accepted"),
    ({'machine': 2}, 'machine=2 is not accepted'),
    ({'note': None}, 'note=None is not accepted'),
    ({'minutes': -1}, 'minutes=-1 is not accepted'),
    ({'minutes': None}, 'minutes=None is not accepted'),
    ({'verdict': 'proved'}, "one: claim 0: verdict='proved' .* accepted are reproduced, not"),
    ({'measured': '3'}, "measured='3' .* finite number"),
    ({'sd': -0.1}, 'sd=-0.1 .* at least 0'),
    ({'seeds': 0}, 'seeds=0 .* 1, 2, 3'),
    ({'seeds': True}, 'seeds=True'),
    ({'source': ''}, "source='' .* must be a text"),
  ],
)
def test_a_malformed_result_is_refused_with_a_sentence(tmp_path, change, message):
  folder = result(tmp_path / 'one', Claim(*SAID, 1.0, 0.0, 1, 'reproduced'), note='Short.')
  values = json.loads((folder / 'result.json').read_text())
  for key, value in change.items():
    (values if key in values else values['claims'][0])[key] = value
  (folder / 'result.json').write_text(json.dumps(values))
  with pytest.raises(BadInput, match=message):
    pages(tmp_path)


def test_a_folder_without_its_files_is_refused(tmp_path):
  folder = result(tmp_path / 'one', Claim(*SAID, 1.0, 0.0, 1, 'reproduced'))
  (folder / 'plot.png').unlink()
  with pytest.raises(BadInput, match=r'no plot\.png'):
    pages(tmp_path)
  (folder / 'result.json').unlink()
  with pytest.raises(BadInput, match=r'result\.json cannot be read'):
    pages(tmp_path)
  with pytest.raises(BadInput, match='must be a folder of results'):
    main(['claims', str(tmp_path / 'none')])


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
  with pytest.raises(ValueError, match='not JSON compliant'):
    result(tmp_path / 'one', Claim(*SAID, 1.0, 0.0, 1, 'reproduced'), runs=[math.inf])
  assert not (tmp_path / 'one').exists()
