"""Compares routers fairly: one model, one data order, the same active parameters, several seeds.

  python -m experiments.compare --config configs/compare/x.py [--workdir DIR] [--out DIR] [--config.key=value ...]

The config is a sweep file whose runs differ in `model.moe.router`, what belongs to it, and `seed`. Trains what is not
finished, as experiments.sweep does, and writes comparison.csv, plot.png, result.json and README.md to --out (else to
DIR): of each router mean and standard deviation of the evaluation loss, tokens per second, FLOPs, entropy of
the load, drops. A router is called better than the first one only beyond two standard deviations of the seeds.
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
from experiments.studies import figure, rows
from experiments.studies.rows import Row, mean_sd
from experiments.sweeps import plan, record

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
  out = workdir.make_folder(Path(own['out']), '--out') if own['out'] else folder
  with workdir.locked(folder):
    sweep.train_all(runs, folder, own['workers'], own['retries'], own['backend'])
  table = rows.read(folder)
  groups = by_router(table)
  lines = compare_all(folder, groups)
  record.write_table(lines, out / 'comparison.csv')
  losses = {name: [row['eval_loss'] for row in group] for name, group in groups.items()}
  ordered = dict(sorted(losses.items(), key=lambda item: statistics.fmean(item[1])))
  figure.bars(
    out / 'plot.png',
    ordered,
    'evaluation loss, nats',
    f'{Path(file).stem}: mean and s.d. over seeds',
  )
  write_page(out, Path(file), overrides, lines, table)
  print(page_table(lines))
  print(f'{out / "comparison.csv"}, {out / "plot.png"}', file=sys.stderr)
  return 0


def _define(values: flags.FlagValues) -> None:
  sweep.define(values)
  flags.DEFINE_string(
    'out', '', 'folder of the table and the figure; else the workdir', flag_values=values
  )


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
  first = next(iter(seeds.values()))
  for name, own in seeds.items():
    if own != first:
      raise BadInput(
        f'router {name} has seeds {own} and others {first}: every router needs the same'
      )
  return groups


def label(row: Row) -> str:
  """'top_k k=2 capacity_factor=1.25', 'dense model' where no layer is a mixture."""
  if row.get('model.moe.layers') == 'none':
    return 'dense model'
  router = dict(row.get('model.moe.router', {}))
  name = str(router.pop('name', 'router'))
  return ' '.join([name, *(f'{key}={value}' for key, value in router.items())])


def compare_all(folder: Path, groups: Mapping[str, Sequence[Row]]) -> list[dict[str, Any]]:
  """A line a router; the first one is what the others are compared with."""
  first = next(iter(groups.values()))
  lines = []
  for name, group in groups.items():
    losses = [row['eval_loss'] for row in group]
    mean, sd = mean_sd(losses)
    measured = [last_metrics(folder / row['key']) for row in group]
    lines.append(
      {
        'router': name,
        'seeds': len(group),
        'loss': mean,
        'sd': sd,
        'verdict': judged(first, group),
        'tokens_per_second': statistics.median(one['tokens_per_second'] for one in measured),
        'flops': group[0]['flops'],
        'N_active': group[0]['N_active'],
        'load_entropy': statistics.fmean(one['load_entropy'] for one in measured),
        'dropped': statistics.fmean(one['dropped'] for one in measured),
      }
    )
  return lines


def judged(first: Sequence[Row], own: Sequence[Row]) -> str:
  """The verdict on a router; its active parameters in those of the first where they differ by more than a router has.

  A router itself is small; experts a token are what must be equal for a claim.
  """
  times = own[0]['N_active'] / first[0]['N_active']
  if abs(times - 1) > 0.02:
    return f'{times:.2f} times the active parameters'
  return verdict([row['eval_loss'] for row in first], [row['eval_loss'] for row in own])


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

  load_entropy is that of the distribution of rows over experts, as a fraction of that of equal loads.
  """
  lines = read_lines(folder / 'metrics.jsonl')
  last = lines[-1]
  speeds = [line['time']['tokens_per_second'] for line in lines[1:] or lines]
  loads = last.get('load', [])
  entropy = statistics.fmean(map(_entropy, loads)) if loads else 1.0
  dropped = statistics.fmean(last['dropped']) if last.get('dropped') else 0.0
  return {
    'tokens_per_second': statistics.median(speeds),
    'load_entropy': entropy,
    'dropped': dropped,
  }


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


def write_page(
  out: Path,
  file: Path,
  overrides: Sequence[str],
  lines: Sequence[Mapping[str, Any]],
  table: Sequence[Row],
) -> None:
  """result.json and README.md beside the figure; the command has the overrides, which every run had."""
  words = ['scripts/python', '-m', 'experiments.compare', '--config', str(file), *overrides]
  command = shlex.join(words)
  values = {
    'command': command,
    'machine': rows.machine(),
    'minutes': rows.minutes(table),
    'routers': list(lines),
  }
  workdir.write_text(out / 'result.json', json.dumps(values, indent=1, allow_nan=False) + '\n')
  seeds = lines[0]['seeds']
  page = (
    f'# Comparison {file.stem}\n\n'
    f'Evaluation loss in nats after the same training, mean ± standard deviation over {seeds} seeds. "Better" and '
    '"worse" than the first router of the file need a mean difference by seed beyond two standard deviations of it. '
    'Nothing is claimed where active parameters differ by more than 2 %. Load entropy is that of the rows over the '
    'experts in the last step, 1 for equal loads.\n\n'
    f'{page_table(lines)}\n\n```sh\n{command}\n```\n\n'
    f'{values["minutes"]:.3g} minutes of runs in all on {values["machine"]}; speeds are of runs side by side, with '
    'whatever else the machine did.\n\n'
    '![plot](plot.png)\n'
  )
  workdir.write_text(out / 'README.md', page)


if __name__ == '__main__':
  cli.run(main)
