"""Which runs a sweep has: a base config, and what each run changes in it.

A sweep file has two functions:

  def get_base():   # ConfigDict, what all runs share
  def get_runs():   # list of dicts {'model.d_model': 128, 'seed': 0, ...}; configs.sweeps.grid makes them of lists
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from experiments.errors import BadInput
from experiments.later import without_later
from experiments.schema import unknown_key
from experiments.settings import Settings


@dataclasses.dataclass(frozen=True)
class Run:
  """One run of a sweep.

  Attributes:
    changes: what it changes in the base, by dotted key.
    config: the resolved config, a plain dict.
    settings: the same, checked.
    key: hash of the resolved config (`experiments.later`); the name of the run's folder.
  """

  changes: Mapping[str, Any]
  config: Mapping[str, Any]
  settings: Settings
  key: str

  @property
  def name(self) -> str:
    """'d_model=128 granularity=4 seed=0': the changes by the last part of their keys."""
    return ' '.join(
      f'{key.rpartition(".")[2]}={_short(value)}' for key, value in self.changes.items()
    )


def load(file: str, overrides: Sequence[str] = ()) -> list[Run]:
  """The runs of a sweep file.

  Args:
    file: a .py file of this machine; it is executed.
    overrides: arguments '--config.key=value', which count for every run and win over its own changes.

  Raises:
    BadInput: one sentence that names the file, and the run where it is one run's fault.
  """
  base, changes = cli.execute(Path(file), 'a sweep', ('get_base', 'get_runs'))
  if not isinstance(base, ConfigDict):
    raise BadInput(f'{file}: get_base() must return a ConfigDict, not a {type(base).__name__}')
  if not isinstance(changes, list) or not all(isinstance(one, Mapping) for one in changes):
    raise BadInput(f'{file}: get_runs() must return a list of dicts')
  if not changes:
    raise BadInput(f'{file}: get_runs() returned no run: an axis of the grid is empty')
  runs: dict[str, Run] = {}
  for index, one in enumerate(changes):
    run = _resolve(f'{file}, run {index}', base, one, overrides)
    if run.key in runs:
      raise BadInput(
        f'{file}: two runs have one config, {run.name!r} and {runs[run.key].name!r}: a finished run never runs twice'
      )
    runs[run.key] = run
  return list(runs.values())


def _resolve(
  where: str, base: ConfigDict, changes: Mapping[str, Any], overrides: Sequence[str]
) -> Run:
  config = base.copy_and_resolve_references()
  accepted = cli.keys(config)
  for key, value in changes.items():
    if key not in accepted:
      raise BadInput(f'{where}: {unknown_key(key, accepted)}')
    with config.unlocked():
      section, _, name = key.rpartition('.')
      parent = config if not section else _get(config, section)
      parent[name] = ConfigDict(value) if isinstance(value, Mapping) else value
  config = cli.override(config, ['', *overrides])
  values = config.to_dict()
  try:
    settings = Settings.from_config(values)
  except BadInput as error:
    raise BadInput(f'{where}: {error}') from error
  key = digest(json.dumps(without_later(values), sort_keys=True))
  return Run(changes, values, settings, key)


def digest(text: str) -> str:
  """The name of a folder for what `text` says."""
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _get(config: ConfigDict, dotted: str) -> Any:
  for name in dotted.split('.'):
    config = config[name]
  return config


def _short(value: Any) -> str:
  """'top_k(k=1)' of a section with a name, so that runs that differ in its options alone are told apart."""
  if not isinstance(value, Mapping) or 'name' not in value:
    return str(value)
  options = ','.join(f'{key}={one}' for key, one in value.items() if key != 'name')
  return f'{value["name"]}({options})' if options else str(value['name'])
