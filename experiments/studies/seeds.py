"""Trains a config with several seeds, each by the command of the README, and records what came out.

  python -m experiments.studies.seeds configs/tiny.py [configs/more.py ...]

writes experiments/results/NAME for each config NAME. A run lies in runs/seeds/NAME/SEED: the same command again goes on
with the seeds that are missing. The time of a run is that of its whole program, from the start of Python to its end.
"""

from __future__ import annotations

import ast
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, workdir
from experiments.errors import BadInput, RunsFailed
from experiments.log import read_lines
from experiments.studies import figure, rows
from experiments.studies.rows import mean_sd

SEEDS = (0, 1, 2)
RUNS = Path('runs') / 'seeds'
_METRICS = {  # name in metrics.jsonl -> how it is said, its factor and its digits
  'eval_loss': ('evaluation loss {} nats', 1, 3),
  'eval_bits_per_byte': ('{} bits per byte', 1, 3),
  'eval_accuracy': ('accuracy {} %', 100, 1),
}


def main(argv: list[str]) -> int:
  usage = 'usage: python -m experiments.studies.seeds configs/NAME.py ...'
  if argv[1:] == ['--help']:
    print(usage)
    return 0
  files = [Path(name) for name in argv[1:]]
  if not files:
    raise BadInput(usage)
  for file in files:
    cli.execute(file, 'a config', ('get_config',))
  for file in files:
    out = rows.RESULTS / file.stem
    folders = [train(file, seed) for seed in SEEDS]
    record(file, folders, out)
    print(out, file=sys.stderr)
  return 0


def train(file: Path, seed: int) -> Path:
  """The folder of a finished run; one that was cut short begins anew, for its time would be wrong.

  Raises:
    RunsFailed: the program did, or a signal stopped it before its last step.
  """
  folder = RUNS / file.stem / str(seed)
  if (folder / 'program.json').is_file():
    return folder
  shutil.rmtree(folder, ignore_errors=True)
  options = ['--config', str(file), f'--config.seed={seed}', '--workdir', str(folder)]
  start = time.monotonic()
  command = [sys.executable, '-m', 'experiments.train', *options]
  code = subprocess.run(command, check=False).returncode
  if code:
    raise RunsFailed(f'{file}, seed {seed}: the program ended with {code}')
  seconds = time.monotonic() - start
  # a signal ends the program in order, with 0
  done = sum(line['step'] + 1 for line in read_lines(folder / 'metrics.jsonl')[-1:])
  steps = workdir.read_json(folder / 'config.json')['steps']
  if done < steps:
    raise RunsFailed(f'{file}, seed {seed}: stopped after its line of step {done} of {steps}')
  workdir.write_text(folder / 'program.json', json.dumps({'seconds': seconds}) + '\n')
  return folder


def record(file: Path, folders: Sequence[Path], out: Path) -> None:
  """Writes result.json, README.md and plot.png of finished runs."""
  curves = [read_lines(folder / 'metrics.jsonl') for folder in folders]
  runs = [
    {
      'seed': workdir.read_json(folder / 'config.json')['seed'],
      'seconds': workdir.read_json(folder / 'program.json')['seconds'],
      'steps': lines[-1]['step'] + 1,
      **{key: lines[-1][key] for key in ('loss', *_METRICS) if key in lines[-1]},
    }
    for folder, lines in zip(folders, curves, strict=True)
  ]
  result = {
    'config': str(file),
    'command': f'scripts/python -m experiments.studies.seeds {file}',
    'machine': rows.machine(),
    'minutes': sum(run['seconds'] for run in runs) / 60,
    'runs': runs,
  }
  out.mkdir(parents=True, exist_ok=True)
  workdir.write_text(out / 'result.json', json.dumps(result, indent=1, allow_nan=False) + '\n')
  workdir.write_text(out / 'README.md', page(file, result))
  draw(out / 'plot.png', {run['seed']: lines for run, lines in zip(runs, curves, strict=True)})


def measured(result: Mapping[str, Any]) -> str:
  """'evaluation loss 2.113 (s.d. 0.085) nats, accuracy 38.5 (s.d. 2.7) %', over the seeds."""
  parts = []
  for key, (text, factor, digits) in _METRICS.items():
    values = [factor * run[key] for run in result['runs'] if key in run]
    if values:
      mean, sd = mean_sd(values)
      parts.append(text.format(f'{mean:.{digits}f} (s.d. {sd:.{digits}f})'))
  return ', '.join(parts)


def seconds(result: Mapping[str, Any]) -> str:
  """'98 s': the median of the whole programs."""
  return f'{statistics.median(run["seconds"] for run in result["runs"]):.0f} s'


def page(file: Path, result: Mapping[str, Any]) -> str:
  """README.md of the folder."""
  title = (ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or '').split('\n')[0]
  seeds = ', '.join(str(run['seed']) for run in result['runs'])
  said = measured(result)
  return (
    f'# {file.stem}\n\n{title} Config: [{file}](../../../{file}).\n\n'
    f'After {result["runs"][0]["steps"]:,} steps: {said}; mean and standard deviation over the seeds {seeds}. The '
    f'whole program, compiling included, takes {seconds(result)} (median) on {result["machine"]}.\n\n'
    f'```sh\n{result["command"]}\n```\n\n![loss over steps, by seed](plot.png)\n'
  )


def draw(file: Path, curves: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
  """Training loss as lines and evaluation loss as dots, a colour a seed."""
  plt = figure.pyplot()
  drawing, axis = plt.subplots(figsize=(6, 3.4), layout='constrained')
  for (seed, lines), colour in zip(curves.items(), ('#1f5fa8', '#d0702a', '#4c9a54'), strict=True):
    axis.plot(
      [line['step'] + 1 for line in lines], [line['loss'] for line in lines], color=colour, lw=0.9
    )
    evaluated = [line for line in lines if 'eval_loss' in line]
    axis.plot(
      [line['step'] + 1 for line in evaluated],
      [line['eval_loss'] for line in evaluated],
      'o',
      color=colour,
      label=f'seed {seed}',
    )
  axis.set_xlabel('steps')
  axis.set_ylabel('loss, nats')
  axis.set_title('training (lines) and evaluation (dots)', loc='left', fontsize=10)
  axis.legend()
  drawing.savefig(file)
  plt.close(drawing)


if __name__ == '__main__':
  cli.run(main)
