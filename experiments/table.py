"""A table of finished runs: CSV with a row a run, read for a fit.

Columns: name, seed, N (parameters without embedding, head and router), N_active (those that work on a token), D
(training tokens), G, E, flops (of the training), eval_loss (nats), status (finished, failed, diverged or
waiting); others are free.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.errors import BadInput

NUMBERS = ('N', 'N_active', 'D', 'G', 'E', 'flops', 'eval_loss')
TEXTS = ('name', 'seed', 'status')
STATUSES = ('finished', 'failed', 'diverged', 'waiting')


@dataclasses.dataclass(frozen=True)
class Run:
  """One row; numbers that a run which did not finish has not are NaN.

  Attributes:
    excluded: why a fit leaves it out; empty for runs that it takes.
  """

  name: str
  seed: str
  status: str
  values: Mapping[str, float]
  excluded: str = ''


@dataclasses.dataclass(frozen=True)
class Table:
  """All rows, and the columns of those that a fit takes."""

  runs: tuple[Run, ...]

  @property
  def used(self) -> tuple[Run, ...]:
    """The rows that are not excluded."""
    return tuple(run for run in self.runs if not run.excluded)

  def column(self, name: str) -> np.ndarray:
    """`[runs used]`."""
    return np.array([run.values[name] for run in self.used], np.float64)

  def only(self, name: str, value: float) -> Table:
    """The rows with this value in a column."""
    return Table(tuple(run for run in self.runs if run.values[name] == value))


def read_table(path: Path, diverged_above: float | None = None) -> Table:
  """The table `path`, or `path/table.csv` of a folder.

  A run is excluded, and stays in the table, when its status is not 'finished', when its loss is not a positive finite
  number, and when its loss is more than `diverged_above`.

  Raises:
    BadInput: no such file, a column that is missing, or a cell that is no number where the run has finished.
  """
  file = path / 'table.csv' if path.is_dir() else path
  try:
    with file.open(newline='', encoding='utf-8') as stream:
      reader = csv.DictReader(stream)
      rows, names = list(reader), reader.fieldnames or ()
  except OSError as error:
    raise BadInput(f'--runs={path}: {file} cannot be read: {error.strerror}') from error
  except (UnicodeDecodeError, csv.Error) as error:
    raise BadInput(f'--runs={path}: {file} cannot be read as CSV: {error}') from error
  missing = [name for name in (*TEXTS, *NUMBERS) if name not in names]
  if missing:
    raise BadInput(f'{file} lacks the columns {", ".join(missing)}: it has {", ".join(names)}')
  return Table(
    tuple(_run(row, f'{file}, row {index}', diverged_above) for index, row in enumerate(rows, 2))
  )


def _run(row: Mapping[str, str], where: str, diverged_above: float | None) -> Run:
  name, seed, status = (row[key] or '' for key in TEXTS)
  if status not in STATUSES:
    raise BadInput(f'{where}: status={status!r} is not accepted: it must be {", ".join(STATUSES)}')
  values = {key: _number(row[key], key, where, status) for key in NUMBERS}
  loss = values['eval_loss']
  excluded = '' if status == 'finished' else status
  if not excluded and not 0 < loss < math.inf:
    excluded = 'diverged: loss is not finite'
  elif not excluded and diverged_above is not None and loss > diverged_above:
    excluded = f'diverged: loss is above {diverged_above:g}'
  return Run(name, seed, status, values, excluded)


def _number(text: str | None, key: str, where: str, status: str) -> float:
  """A cell; only a loss may be anything, and a run that has not finished may lack what it will."""
  try:
    value = float(text or '')
  except ValueError as error:
    if status == 'finished' and not (key == 'eval_loss' and not text):
      raise BadInput(f'{where}: {key}={text!r} is not a number') from error
    return math.nan
  if status == 'finished' and key != 'eval_loss' and not 0 < value < math.inf:
    raise BadInput(f'{where}: {key}={text!r} is not accepted: it must be a number more than 0')
  return value
