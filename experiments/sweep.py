"""Trains all runs of a sweep: a grid or list over one config.

  python -m experiments.sweep --config configs/sweeps/x.py [--workdir DIR] [--config.key=value ...]

Each run has a folder of its own in DIR, named by the hash of its resolved config. The same command again goes on: a
finished run never runs twice, a run that was killed resumes, a failed one is tried again. DIR/table.csv has a row a
run. A run whose loss is not finite at the end is kept and marked 'diverged'.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments import cli, workdir
from experiments.errors import RunsFailed
from experiments.sweeps import local, plan, record, remote
from experiments.sweeps.cost import Costs
from experiments.sweeps.plan import Run
from experiments.sweeps.screen import Screen

BACKENDS = ('local', 'submitit', 'ray')
_REDRAW_SECONDS = 1.0


def main(argv: list[str]) -> int:
  file, given, own, overrides = cli.parse_own(
    argv,
    'experiments.sweep',
    define,
    config='a file of runs, such as configs/sweeps/soft_moe_cpu.py (see experiments/sweeps/plan.py)',
    workdir='where runs and table.csv are written, and go on; without it runs/sweeps/<config>',
  )
  runs = plan.load(file, overrides)
  if own['list']:
    list_runs(runs)
    return 0
  folder = Path(given) if given else Path('runs') / 'sweeps' / Path(file).stem
  with workdir.locked(folder):
    train_all(runs, folder, own['workers'], own['retries'], own['backend'])
  print(f'Table: {folder / "table.csv"}', file=sys.stderr)
  return 0


def define(values: flags.FlagValues) -> None:
  """The flags that every program with many runs has."""
  flags.DEFINE_integer(
    'workers', 0, 'runs at a time; 0: one a core, or 1 on an accelerator', 0, flag_values=values
  )
  flags.DEFINE_integer(
    'retries', 1, 'how often a run that failed is tried again', 0, flag_values=values
  )
  flags.DEFINE_enum('backend', 'local', BACKENDS, 'who runs them', flag_values=values)
  flags.DEFINE_boolean('list', False, 'print the runs and do nothing', flag_values=values)


def list_runs(runs: list[Run]) -> None:
  """Prints folder and name of each run."""
  for run in runs:
    print(run.key, run.name)


def train_all(runs: list[Run], folder: Path, workers: int, retries: int, backend: str) -> None:
  """Trains what is not finished, and writes table.csv.

  Args:
    runs: of the sweep.
    folder: of the sweep.
    workers: runs at a time; 0: as many as fit this machine.
    retries: how often a run that failed is tried again.
    backend: one of BACKENDS.

  Raises:
    RunsFailed: runs that failed every time; all others were trained.
  """
  done = [run for run in runs if record.read_result(folder / run.key)]
  waiting = [run for run in runs if run not in done]
  workers = workers or local.default_workers()
  costs = Costs(runs)
  screen = Screen(folder, runs, costs.flops, workers)
  for run in done:
    screen.skip(run)
  attempts: dict[str, int] = collections.Counter()
  failed: dict[str, str] = {}

  def ended(run: Run, result: dict[str, Any] | str) -> None:
    attempts[run.key] += 1
    failed.pop(run.key, None)
    if isinstance(result, str):
      failed[run.key] = result
    screen.ended(run, result, retry=bool(failed.get(run.key)) and attempts[run.key] <= retries)
    record.write_table(record.table(runs, folder, failed), folder / 'table.csv')

  pool = make_pool(backend, folder, workers, screen.started, ended)
  with redrawn(screen), sigterm_as_ctrl_c():
    while waiting:
      pool(waiting, costs.shape)
      waiting = [run for run in waiting if run.key in failed and attempts[run.key] <= retries]
  record.write_table(record.table(runs, folder, failed), folder / 'table.csv')
  names = [run.name for run in runs if run.key in failed]
  if names:
    raise RunsFailed(
      f'{len(names)} of {len(runs)} runs failed, the first: {names[0]}; the same command tries them again'
    )


def make_pool(backend: str, folder: Path, workers: int, on_start: Any, on_end: Any) -> Any:
  """What trains runs: `pool(runs, shape)`."""
  if backend == 'local':
    return local.Pool(folder, workers, on_start, on_end)
  kind = {'submitit': remote.Submitit, 'ray': remote.Ray}[backend]
  return kind(folder, workers, on_start, on_end)


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
  """A SIGTERM, such as a scheduler sends, ends the sweep with its workers too."""

  def interrupt(number, frame):
    raise KeyboardInterrupt

  previous = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def redrawn(screen: Screen) -> Iterator[None]:
  """Redraws the screen every second, in a thread."""
  stop = threading.Event()

  def draw() -> None:
    while not stop.wait(_REDRAW_SECONDS):
      screen.redraw()

  thread = threading.Thread(target=draw, daemon=True)
  thread.start()
  try:
    yield
  finally:
    stop.set()
    thread.join()
    screen.close()


if __name__ == '__main__':
  cli.run(main)
