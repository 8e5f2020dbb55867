"""What papers claim beside what was measured here: the folders experiments/results/NAME.

NAME/result.json   {"claims": [...], "command", "machine", "minutes", ...}, further keys as the experiment likes
NAME/plot.png      the figure
NAME/README.md     generated from result.json

`python -m experiments.claims` writes each README.md anew, and experiments/results/README.md with all claims in one
table. A result.json without `claims`, such as a benchmark's, is a measurement: its README.md is written by hand and
listed. An experiment calls `write_result`, draws plot.png, and runs this program.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.claims_page import VERDICTS, folder_page, overview
from experiments.errors import BadInput
from experiments.workdir import read_json, write_text

RESULTS = Path(__file__).resolve().parent / 'results'
_MIN_SEEDS = 3
_USAGE = """usage: python -m experiments.claims [FOLDER]

  writes README.md in FOLDER (without it experiments/results), and in each of its folders that has claims
"""


@dataclasses.dataclass(frozen=True)
class Claim:
  """One statement of a paper, and what came out here.

  Attributes:
    claim: a sentence that can be wrong, such as 'expert choice has a lower loss than top-1 at equal compute'.
    source: paper and place.
    published: the paper's number or words.
    measured: the number that decides.
    sd: its sample standard deviation over seeds; 0 where nothing is drawn.
    seeds: how many seeds it is of.
    verdict: one of VERDICTS.

  Raises:
    ValueError: a field is empty, not finite, negative or not a verdict.
  """

  claim: str
  source: str
  published: str
  measured: float
  sd: float
  seeds: int
  verdict: str

  def __post_init__(self):
    for name in ('claim', 'source', 'published', 'verdict'):
      value = getattr(self, name)
      if not isinstance(value, str) or not value.strip():
        raise ValueError(f'{name}={value!r} of a claim is not accepted: it must be a text')
    for name in ('measured', 'sd'):
      value = getattr(self, name)
      if not _is_number(value):
        raise ValueError(f'{name}={value!r} of a claim is not accepted: it must be a finite number')
    if self.sd < 0:
      raise ValueError(f'sd={self.sd!r} of a claim is not accepted: it must be at least 0')
    if not isinstance(self.seeds, int) or isinstance(self.seeds, bool) or self.seeds < 1:
      raise ValueError(f'seeds={self.seeds!r} of a claim is not accepted: it must be 1, 2, 3, ...')
    if self.verdict not in VERDICTS:
      accepted = ', '.join(VERDICTS)
      raise ValueError(
        f'verdict={self.verdict!r} of a claim is not accepted: accepted are {accepted}'
      )


def compare(
  claim: str,
  source: str,
  published: str,
  better: Sequence[float],
  worse: Sequence[float],
  *,
  higher_is_better: bool = False,
  paired: bool = True,
) -> Claim:
  """A claim of the kind 'A is better than B', decided over seeds.

  `measured` is the mean advantage of `better`, positive if it goes the way of the claim. `sd` is the sample standard
  deviation (ddof = 1) of the advantage of a single seed: not the smaller error of a mean.

  Args:
    claim: the sentence; see Claim.
    source: paper and place.
    published: the paper's number or words.
    better: one value a seed of what the claim says is better.
    worse: of the other; paired, the values of one seed (same data, same order) stand at the same place.
    higher_is_better: of accuracies; without it the values are losses, times or sizes.
    paired: sd is that of the differences by seed; otherwise the root of the summed variances of both.

  Raises:
    ValueError: fewer than two seeds, a value that is not finite, or pairs of unequal number.
  """
  if paired and len(better) != len(worse):
    raise ValueError(
      f'{len(better)} and {len(worse)} values are not pairs by seed: accepted are as many of both, or paired=False'
    )
  if broken := [value for value in (*better, *worse) if not math.isfinite(value)]:
    raise ValueError(f'{broken[0]} is not accepted: every seed must have a finite number')
  seeds = min(len(better), len(worse))
  if seeds < 2:
    raise ValueError(
      f'{seeds} seeds have no standard deviation: accepted are 2 or more, 3 for a verdict'
    )
  sign = 1 if higher_is_better else -1
  if paired:
    advantages = [sign * (float(a) - float(b)) for a, b in zip(better, worse, strict=True)]
    measured, sd = statistics.fmean(advantages), statistics.stdev(advantages)
  else:
    measured = sign * (statistics.fmean(better) - statistics.fmean(worse))
    sd = math.hypot(*(statistics.stdev(map(float, values)) for values in (better, worse)))
  return Claim(claim, source, published, measured, sd, seeds, verdict(measured, sd, seeds))


def verdict(advantage: float, sd: float, seeds: int) -> str:
  """Reproduced or opposite beyond two standard deviations of three seeds or more; else not reproduced."""
  if seeds < _MIN_SEEDS or abs(advantage) <= 2 * sd:
    return 'not reproduced'
  return 'reproduced' if advantage > 0 else 'opposite'


def write_result(
  folder: Path,
  claims: Sequence[Claim],
  command: str,
  machine: str,
  minutes: float,
  **extra: Any,
) -> None:
  """Writes result.json and README.md; plot.png beside them is the caller's.

  Args:
    folder: experiments/results/NAME; made if it is missing.
    claims: at least one.
    command: what to type to do it again, from the root of a checkout.
    machine: such as 'two x86-64 cores, CPU, Python 3.11, jax 0.10.2'.
    minutes: of all seeds and variants together, on that machine.
    extra: goes into result.json; `title` (one line) and `note` (paragraphs: sizes, and how we deviate from the paper)
      also on the page.

  Raises:
    BadInput: a value is not accepted.
    ValueError, TypeError: `extra` is not JSON, or has numbers that are not finite.
    StorageError: the folder cannot be written.
  """
  values = {
    'claims': [dataclasses.asdict(claim) for claim in claims],
    'command': command,
    'machine': machine,
    'minutes': minutes,
    **extra,
  }
  page = folder_page(folder.name, values, read_claims(folder.name, values))
  text = json.dumps(values, indent=1, allow_nan=False) + '\n'
  folder.mkdir(parents=True, exist_ok=True)
  write_text(folder / 'result.json', text)
  write_text(folder / 'README.md', page)


def read_claims(folder: str, values: Mapping[str, Any]) -> list[Claim]:
  """The claims of a result.json.

  Args:
    folder: its name, for the errors.
    values: what result.json holds.

  Raises:
    BadInput: they are not as `write_result` writes them.
  """
  given = values.get('claims')
  if not isinstance(given, list) or not given:
    raise BadInput(f'{folder}: claims={given!r} is not accepted: it must be a list of claims')
  for name in ('command', 'machine', *({'title', 'note'} & set(values))):
    if not isinstance(values.get(name), str) or not values[name].strip():
      raise BadInput(f'{folder}: {name}={values.get(name)!r} is not accepted: it must be a text')
  minutes = values.get('minutes')
  if not _is_number(minutes) or minutes < 0:
    raise BadInput(f'{folder}: minutes={minutes!r} is not accepted: it must be a number')
  fields = {field.name for field in dataclasses.fields(Claim)}
  claims = []
  for index, one in enumerate(given):
    if not isinstance(one, dict) or set(one) != fields:
      keys = ', '.join(one) if isinstance(one, dict) else repr(one)
      accepted = ', '.join(sorted(fields))
      raise BadInput(f'{folder}: claim {index} has {keys}: accepted are exactly {accepted}')
    try:
      claims.append(Claim(**one))
    except ValueError as error:
      raise BadInput(f'{folder}: claim {index}: {error}') from error
  return claims


def pages(results: Path) -> dict[Path, str]:
  """File -> text of every generated page: one for each folder with claims, and that of `results` itself.

  Raises:
    BadInput: a folder is malformed.
  """
  texts, claimed, measurements = {}, {}, []
  for folder in sorted(path for path in results.iterdir() if path.is_dir()):
    values = read_json(folder / 'result.json')
    if 'claims' in values:
      claimed[folder.name] = read_claims(folder.name, values)
      if not (folder / 'plot.png').is_file():
        raise BadInput(f'{folder} has claims and no plot.png: draw its figure')
      texts[folder / 'README.md'] = folder_page(folder.name, values, claimed[folder.name])
    elif said := _hand_written(folder / 'README.md'):
      measurements.append((folder.name, *said))
  return texts | {results / 'README.md': overview(claimed, measurements)}


def _hand_written(file: Path) -> tuple[str, str] | None:
  """Title and first sentence of a README.md; None without a title."""
  lines = file.read_text(encoding='utf-8').splitlines() if file.is_file() else []
  if not lines or not lines[0].startswith('# '):
    return None
  first = next((line for line in lines[1:] if line.strip()), '').split('. ')[0].strip()
  text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', first)  # links are relative to its folder
  return lines[0].removeprefix('# ').strip(), text.rstrip('.')


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def main(argv: list[str]) -> int:
  """Writes the pages; returns the exit code."""
  if len(argv) > 2 or argv[1:] == ['--help']:
    print(_USAGE, end='')
    return 0 if len(argv) == 2 else 2
  results = Path(argv[1]) if argv[1:] else RESULTS
  if not results.is_dir():
    raise BadInput(f'{results} is not accepted: it must be a folder of results')
  for file, text in pages(results).items():
    write_text(file, text)
    print(file)
  return 0


if __name__ == '__main__':
  cli.run(main)
