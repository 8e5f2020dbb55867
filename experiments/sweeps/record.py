"""What a run of a sweep leaves: result.json in its folder, and the sweep's table.csv made of all of them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments import workdir
from experiments.settings import Settings
from experiments.sweeps.plan import Run

FINISHED, DIVERGED, FAILED, WAITING = 'finished', 'diverged', 'failed', 'waiting'

# Columns of table.csv before those of the run's own changes and metrics
_FIRST = ('key', 'name', 'status', 'seed', 'N', 'N_active', 'D', 'G', 'E', 'flops', 'eval_loss')


def result_path(folder: Path) -> Path:
  return folder / 'result.json'


def read_result(folder: Path) -> dict[str, Any] | None:
  """The result of a run that came to its end; None where there is none.

  Raises:
    BadInput: the file is no JSON object.
  """
  file = result_path(folder)
  return workdir.read_json(file) if file.is_file() else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
  """Replaces result.json at once.

  Raises:
    StorageError: it cannot be written.
  """
  workdir.write_text(result_path(folder), json.dumps(result, indent=1, sort_keys=True) + '\n')


def size(
  settings: Settings,
  counts: Mapping[str, int],
  tokens: int,
  flops: float,
  active: float,
  active_heads: float = 1.0,
) -> dict[str, Any]:
  """The columns that scaling laws are fitted to.

  Args:
    settings: of the run.
    counts: parameters by part, of `moejax.transformer.flops.count_params`.
    tokens: that it trained on.
    flops: of the whole training.
    active: fraction of the routed experts' parameters that works on a token.
    active_heads: the same of heads that are experts.

  Returns:
    N: parameters without embeddings, output layer and router (Krajewski et al. 2024). N_active: those of them that
    work on one token. D: tokens. G: granularity. E: expansion rate, experts at granularity 1; 1 for a dense model.
  """
  moe = settings.model.moe
  outside = sum(counts.get(part, 0) for part in ('embed', 'head', 'moe/router', 'attention/router'))
  total = counts['total'] - outside
  idle = counts.get('moe/experts', 0) * (1 - min(1.0, active))
  idle += counts.get('attention/experts', 0) * (1 - min(1.0, active_heads))
  is_moe = bool(settings.model.moe_layers)
  return {
    'N': total,
    'N_active': total - round(idle),
    'D': tokens,
    'G': moe.granularity if is_moe else 1,
    'E': moe.num_experts if is_moe else 1,
    'flops': flops,
  }


def status_of(metrics: Mapping[str, Any]) -> str:
  """'diverged' where the evaluation loss is missing or not finite, else 'finished'."""
  loss = metrics.get('eval_loss')
  return FINISHED if loss is not None and math.isfinite(loss) else DIVERGED


def table(
  runs: Iterable[Run], folder: Path, failed: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
  """A row a run: its changes, and of its result the status, sizes, losses and whatever else is a number.

  Args:
    runs: of the sweep.
    folder: of the sweep.
    failed: why a run has no result, by its key.
  """
  rows = []
  for run in runs:
    reason = (failed or {}).get(run.key)
    without = {'status': WAITING} if reason is None else {'status': FAILED, 'reason': reason}
    result = read_result(folder / run.key) or without
    changes = {
      key: json.dumps(value) if isinstance(value, Mapping) else value
      for key, value in run.changes.items()
    }
    row = {'key': run.key, 'name': run.name, 'seed': run.settings.seed, **changes}
    rows.append(row | {k: v for k, v in result.items() if not isinstance(v, (list, dict))})
  return rows


def write_table(rows: list[dict[str, Any]], file: Path) -> None:
  """Rows as CSV with a header; the columns are those of all rows, empty where a row has none.

  Raises:
    StorageError: the file cannot be written.
  """
  columns = dict.fromkeys(_FIRST) | dict.fromkeys(key for row in rows for key in row)
  text = io.StringIO()
  writer = csv.DictWriter(text, list(columns), restval='', lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
  workdir.write_text(file, text.getvalue())
