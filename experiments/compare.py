"""Compares routers fairly: one model, one data order, the same active parameters, several seeds.

  python -m experiments.compare --config configs/compare/x.py [--workdir DIR] [--out DIR] [--add_to DIR]
    [--config.key=value ...]

The config is a sweep file whose runs differ in `model.moe.router`, what belongs to it, and `seed`. Trains what is not
finished, as experiments.sweep does, and writes comparison.csv, plot.png, result.json and README.md to --out (else to
DIR): of each router mean and standard deviation of the evaluation loss, tokens per second, FLOPs, entropy of
the load, drops. A router is called better than the first one only beyond two standard deviations of the seeds.

With --add_to, the comparison that is recorded there gets what the file has beside: routers whose runs are in its
result.json are not trained again, and all is written anew, there unless --out says where. A router whose entry is
taken out of result.json is trained again.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, sweep, workdir
from experiments.errors import BadInput
from experiments.log import read_lines
from experiments.report import experts_of_layers
from experiments.studies import figure, rows
from experiments.studies.rows import Row, mean_sd
from experiments.sweeps import plan, record
from experiments.sweeps.plan import Run

COLUMNS = (
  'router',
  'seeds',
  'loss',
  'sd',
  'verdict',
  'tokens_per_second',
  'flops',
  'N_active',
  'load_entropy',
  'dropped',
)
Line = dict[str, Any]
"""Of a router: COLUMNS, and by seed `losses` and `runs`, their keys."""


def main(argv: list[str]) -> int:
  file, given, own, overrides = cli.parse_own(
    argv,
    'experiments.compare',
    _define,
    config='a file of runs, such as configs/compare/lm_tiny.py (see experiments/sweeps/plan.py)',
    workdir='where runs are written, and go on; without it runs/compare/<config>',
  )
  runs = plan.load(file, overrides)
  if own['list']:
    sweep.list_runs(runs)
    return 0
  folder = Path(given) if given else Path('runs') / 'compare' / Path(file).stem
  before = read_record(Path(own['add_to'])) if own['add_to'] else {}
  where = own['out'] or own['add_to']
  out = workdir.make_folder(Path(where), '--out') if where else folder
  recorded = still_recorded(runs, before)
  missing = [run for run in runs if label(run.changes) not in recorded]
  table: list[Row] = []
  if missing:
    with workdir.locked(folder):
      sweep.train_all(missing, folder, own['workers'], own['retries'], own['backend'])
    table = rows.read(folder)
  trained = {name: measured(folder, name, group) for name, group in by_router(table).items()}
  names = dict.fromkeys(label(run.changes) for run in runs)
  lines = judge([recorded.get(name) or trained[name] for name in names])
  record.write_table(
    [{key: line[key] for key in COLUMNS} for line in lines], out / 'comparison.csv'
  )
  draw(out / 'plot.png', Path(file).stem, lines)
  write_page(out, Path(file), overrides, lines, table, before)
  print(page_table(lines))
  print(f'{out / "comparison.csv"}, {out / "plot.png"}', file=sys.stderr)
  return 0


def _define(values: flags.FlagValues) -> None:
  sweep.define(values)
  flags.DEFINE_string(
    'out', '', 'folder of the table and the figure; else the workdir', flag_values=values
  )
  flags.DEFINE_string(
    'add_to',
    '',
    'folder of a recorded comparison, whose routers are not trained again',
    flag_values=values,
  )


def read_record(folder: Path) -> dict[str, Any]:
  """The result.json of a comparison.

  Raises:
    BadInput: there is none, or it is not of a comparison.
  """
  file = folder / 'result.json'
  found = workdir.read_json(file) if file.is_file() else {}
  if 'routers' not in found:
    raise BadInput(
      f'--add_to={folder}: accepted is the folder of a recorded comparison, with its result.json'
    )
  return found


def still_recorded(runs: Sequence[Run], before: Mapping[str, Any]) -> dict[str, Line]:
  """The recorded lines of the routers whose runs are those that the file asks for."""
  wanted: dict[str, list[str]] = {}
  for run in runs:
    wanted.setdefault(label(run.changes), []).append(run.key)
  lines = {line['router']: line for line in before.get('routers', ())}
  return {
    name: lines[name]
    for name, keys in wanted.items()
    if name in lines and sorted(lines[name].get('runs', ())) == sorted(keys)
  }


def by_router(table: Sequence[Row]) -> dict[str, list[Row]]:
  """Rows by router, in the order of the file, each group in the order of its seeds.

  Raises:
    BadInput: a run that diverged, or routers with unlike seeds.
  """
  groups: dict[str, list[Row]] = {}
  for row in table:
    if row.get('status') == record.DIVERGED or 'eval_loss' not in row:
      raise BadInput(
        f'{row["name"]} diverged: take it out of the comparison, or lower its learning rate'
      )
    groups.setdefault(label(row), []).append(row)
  for group in groups.values():
    group.sort(key=lambda row: row['seed'])
  seeds = {name: [row['seed'] for row in group] for name, group in groups.items()}
  first = next(iter(seeds.values()), [])
  for name, own in seeds.items():
    if own != first:
      raise BadInput(
        f'router {name} has seeds {own} and others {first}: every router needs the same'
      )
  return groups


def label(row: Mapping[str, Any]) -> str:
  """'top_k k=2 capacity_factor=1.25', 'dense model' where no layer is a mixture."""
  if row.get('model.moe.layers') == 'none':
    return 'dense model'
  router = dict(row.get('model.moe.router', {}))
  name = str(router.pop('name', 'router'))
  return ' '.join([name, *(f'{key}={value}' for key, value in router.items())])


def measured(folder: Path, name: str, group: Sequence[Row]) -> Line:
  """The line of a router, without its verdict."""
  losses = [row['eval_loss'] for row in group]
  mean, sd = mean_sd(losses)
  of_runs = [last_metrics(folder / row['key']) for row in group]
  return {
    'router': name,
    'seeds': len(group),
    'loss': mean,
    'sd': sd,
    'tokens_per_second': statistics.median(one['tokens_per_second'] for one in of_runs),
    'flops': group[0]['flops'],
    'N_active': group[0]['N_active'],
    'load_entropy': statistics.fmean(one['load_entropy'] for one in of_runs),
    'dropped': statistics.fmean(one['dropped'] for one in of_runs),
    'losses': losses,
    'runs': [row['key'] for row in group],
  }


def judge(lines: Sequence[Line]) -> list[Line]:
  """The lines with their verdicts, against the first one by seed. One recorded without its losses keeps its own.

  Raises:
    BadInput: the first one is recorded without its losses, so that nothing can be compared with it.
  """
  first = lines[0]
  if 'losses' not in first and any('losses' in line for line in lines):
    raise BadInput(
      f'router {first["router"]}, which the others are compared with, is recorded without the losses of its seeds: '
      'take its entry out of result.json, so that it is trained again'
    )
  return [
    {**line, 'verdict': judged(first, line)} if 'losses' in line else dict(line) for line in lines
  ]


def judged(first: Line, own: Line) -> str:
  """The verdict on a router; its active parameters in those of the first where they differ by more than a router has.

  A router itself is small; experts a token are what must be equal for a claim.
  """
  times = own['N_active'] / first['N_active']
  if abs(times - 1) > 0.02:
    return f'{times:.2f} times the active parameters'
  return verdict(first['losses'], own['losses'])


def verdict(first: Sequence[float], own: Sequence[float]) -> str:
  """'better' or 'worse' than the first router where the mean difference by seed exceeds two standard deviations."""
  differences = [a - b for a, b in zip(first, own, strict=True)]
  if len(differences) < 3:
    return 'too few seeds'
  mean, sd = mean_sd(differences)
  if abs(mean) <= 2 * sd or mean == 0:
    return 'no difference'
  return 'better' if mean > 0 else 'worse'


def last_metrics(folder: Path) -> dict[str, float]:
  """Of a run's last line: tokens per second of the whole run, load entropy and drops, means over layers.

  load_entropy is that of the distribution of rows over experts, as a fraction of that of equal loads over all
  experts of the layer.
  """
  lines = read_lines(folder / 'metrics.jsonl')
  last = lines[-1]
  speeds = [line['time']['tokens_per_second'] for line in lines[1:] or lines]
  dropped = statistics.fmean(last['dropped']) if last.get('dropped') else 0.0
  return {
    'tokens_per_second': statistics.median(speeds),
    'load_entropy': _load_entropy(last.get('load', []), folder),
    'dropped': dropped,
  }


def _load_entropy(loads: Sequence[Sequence[float]], folder: Path) -> float:
  """Mean over the layers of a run; 1 of a dense model."""
  if not loads:
    return 1.0
  config = workdir.read_json(workdir.config_path(folder))
  counts = experts_of_layers(config, len(loads), len(loads[0]))
  return statistics.fmean(_entropy(load[:count]) for load, count in zip(loads, counts, strict=True))


def _entropy(load: Sequence[float]) -> float:
  total = sum(load)
  nats = -sum(one / total * math.log(one / total) for one in load if one > 0)
  return nats / math.log(len(load)) if len(load) > 1 else 1.0


def page_table(lines: Sequence[Mapping[str, Any]]) -> str:
  """The comparison as a Markdown table, the lowest loss first."""
  head = ('router', 'loss', 'against the first', 'tokens/s', 'GFLOPs', 'load entropy', 'dropped')
  text = [f'| {" | ".join(head)} |', f'|{"---|" * len(head)}']
  for line in sorted(lines, key=lambda line: line['loss']):
    cells = (
      f'`{line["router"]}`',
      f'{line["loss"]:.4f} ± {line["sd"]:.4f}',
      'the first' if line is lines[0] else line['verdict'],
      f'{line["tokens_per_second"]:,.0f}',
      f'{line["flops"] / 1e9:,.0f}',
      f'{line["load_entropy"]:.3f}',
      f'{100 * line["dropped"]:.1f} %',
    )
    text.append(f'| {" | ".join(cells)} |')
  return '\n'.join(text)


def draw(file: Path, name: str, lines: Sequence[Line]) -> None:
  """The figure, the lowest loss first."""
  ordered = sorted(lines, key=lambda line: line['loss'])
  figure.bars(
    file,
    {line['router']: line.get('losses', ()) for line in ordered},
    'evaluation loss, nats',
    f'{name}: mean and s.d. over seeds',
    [(line['loss'], line['sd']) for line in ordered],
  )


def write_page(
  out: Path,
  file: Path,
  overrides: Sequence[str],
  lines: Sequence[Line],
  table: Sequence[Row],
  before: Mapping[str, Any],
) -> None:
  """result.json and README.md beside the figure; the command has the overrides, which every run had."""
  words = ['scripts/python', '-m', 'experiments.compare', '--config', str(file), *overrides]
  command = shlex.join(words)
  machines = dict.fromkeys([before['machine']] if before else [])
  machines |= dict.fromkeys([rows.machine()] if table else [])
  values = {
    'command': command,
    'machine': ' and '.join(machines),
    'minutes': before.get('minutes', 0) + rows.minutes(table),
    'routers': list(lines),
  }
  workdir.write_text(out / 'result.json', json.dumps(values, indent=1, allow_nan=False) + '\n')
  seeds, old = lines[0]['seeds'], sum('losses' not in line for line in lines)
  kept = (
    f' Of {old} of the {len(lines)} routers the losses of single seeds are not recorded (those without `losses` in '
    'result.json): they keep the verdict against the first router as it was trained beside them.'
  )
  page = (
    f'# Comparison {file.stem}\n\n'
    f'Evaluation loss in nats after the same training, mean ± standard deviation over {seeds} seeds. "Better" and '
    '"worse" than the first router of the file need a mean difference by seed beyond two standard deviations of it. '
    'Nothing is claimed where active parameters differ by more than 2 %. Load entropy is that of the rows over the '
    f'experts in the last step, 1 for equal loads.{kept if old else ""}\n\n'
    f'{page_table(lines)}\n\n```sh\n{command}\n```\n\n'
    f'{values["minutes"]:.3g} minutes of runs in all on {values["machine"]}; speeds are of runs side by side, with '
    'whatever else the machine did.\n\n'
    '![plot](plot.png)\n'
  )
  workdir.write_text(out / 'README.md', page)


if __name__ == '__main__':
  cli.run(main)
