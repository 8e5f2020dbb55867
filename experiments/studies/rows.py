"""Rows of a sweep's table.csv, and what every study does with them."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.errors import BadInput

Row = dict[str, Any]
_TEXT = ('key', 'name', 'status')  # a key such as 51e097846213 would be read as a number
RESULTS = Path(__file__).resolve().parents[1] / 'results'


def read(folder: Path) -> list[Row]:
  """The finished runs of a sweep's folder; numbers as numbers, routers and losses as dicts, absent cells left out.

  Raises:
    BadInput: there is no table, or a run in it is not finished.
  """
  file = folder / 'table.csv'
  if not file.is_file():
    raise BadInput(f'{file} is missing: run the sweep with --workdir={folder} first')
  with file.open(encoding='utf-8', newline='') as stream:
    rows = [
      {k: v if k in _TEXT else _value(v) for k, v in row.items() if v}
      for row in csv.DictReader(stream)
    ]
  unfinished = [row['name'] for row in rows if row['status'] in ('waiting', 'failed')]
  if unfinished:
    raise BadInput(
      f'{file}: {len(unfinished)} runs are not finished, the first is {unfinished[0]!r}'
    )
  return rows


def by_seed(rows: Sequence[Row], column: str, where: Callable[[Row], bool]) -> list[float]:
  """The column of the rows that `where` accepts, in the order of their seeds.

  Raises:
    BadInput: no row, or two of one seed.
  """
  chosen = sorted((row for row in rows if where(row)), key=lambda row: row['seed'])
  seeds = [row['seed'] for row in chosen]
  if not seeds or len(set(seeds)) < len(seeds):
    raise BadInput(
      f'{len(seeds)} rows with seeds {seeds}: accepted are runs that differ in their seed'
    )
  return [float(row[column]) for row in chosen]


def router_is(**options: Any) -> Callable[[Row], bool]:
  """Accepts rows whose router column is exactly this."""
  return lambda row: row.get('model.moe.router') == options


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
  """Mean and sample standard deviation."""
  return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def commands(study: str) -> str:
  """What to type for a study and its sweep."""
  name, folder = f'{study}_cpu', f'runs/{study}_cpu'
  return (
    f'scripts/python -m experiments.sweep --config configs/sweeps/{name}.py --workdir {folder}\n'
    f'scripts/python -m experiments.studies.{study} {folder}'
  )


def minutes(rows: Sequence[Row]) -> float:
  """Of all runs one after the other; the sweep has two workers or more and takes that much less."""
  return sum(row['seconds'] for row in rows) / 60


def machine() -> str:
  """'2 x86_64 cores, cpu, Python 3.11, jax 0.10.2'."""
  cores = len(os.sched_getaffinity(0))
  python = '.'.join(platform.python_version_tuple()[:2])
  return f'{cores} {platform.machine()} cores, {jax.default_backend()}, Python {python}, jax {jax.__version__}'


def _value(text: str) -> Any:
  if text.startswith('{'):
    return json.loads(text)
  if re.fullmatch(r'-?\d+', text):
    return int(text)
  try:
    return float(text)
  except ValueError:
    return text
