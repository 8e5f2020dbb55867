"""One screen for a whole sweep: how many runs are done, what each worker is at, how long it will take."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from experiments.log import read_lines
from experiments.progress import clock_time
from experiments.sweeps.plan import Run


class Screen:
  """Tells of a sweep: in a terminal a bar and a line a running run, redrawn; elsewhere a line a finished run.

  The time left assumes that the work of a run, given by `cost`, takes as long as that of the finished runs did.

  Args:
    folder: of the sweep.
    runs: all, finished ones included.
    cost: the work of a run in any unit.
    workers: runs at a time.
    stream: where to tell; standard error if not given.
    clock: seconds, for tests.
  """

  def __init__(
    self,
    folder: Path,
    runs: list[Run],
    cost: Callable[[Run], float],
    workers: int,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._folder, self._total, self._workers, self._clock = folder, len(runs), workers, clock
    self._stream = stream or sys.stderr
    self._cost = {run.key: cost(run) for run in runs}
    self._left = dict(self._cost)
    self._running: dict[str, Run] = {}
    self._done_cost, self._failed, self._start = 0.0, 0, clock()
    self._bar = None
    if self._stream.isatty():
      self._bar = tqdm(total=len(runs), unit='run', file=self._stream, dynamic_ncols=True)
      self._lines = [
        tqdm(total=0, position=i + 1, bar_format='{desc}', file=self._stream)
        for i in range(workers)
      ]

  def skip(self, run: Run) -> None:
    """Notes a run that was finished before."""
    del self._left[run.key]
    if self._bar is not None:
      self._bar.update(1)

  def started(self, run: Run) -> None:
    self._running[run.key] = run

  def ended(self, run: Run, result: Mapping[str, Any] | str, retry: bool = False) -> None:
    """Notes the result of a run, or the reason why it has none."""
    del self._running[run.key]
    if retry:
      self._tell(f'failed, will be tried again: {run.name}: {result}')
      return
    self._done_cost += self._left.pop(run.key)
    if isinstance(result, str):
      self._failed += 1
      self._tell(f'failed: {run.name}: {result}')
      return
    loss = result.get('eval_loss')
    told = f'evaluation loss {loss:.4f}' if loss is not None else str(result['status'])
    self._tell(f'{run.name}: {told}, {result["seconds"]:.0f} s')
    if self._bar is not None:
      self._bar.update(1)

  def redraw(self) -> None:
    """Looks at the running runs' metrics and draws their lines anew; nothing outside a terminal."""
    if self._bar is None:
      return
    lines = [self._line(run) for run in list(self._running.values())]
    for bar, line in zip(self._lines, lines + [''] * len(self._lines), strict=False):
      bar.set_description_str(line)
    self._bar.set_postfix_str(self._left_text())

  def close(self) -> None:
    if self._bar is not None:
      for bar in [*self._lines, self._bar]:
        bar.close()

  def seconds_left(self) -> float | None:
    """None before the first run has ended."""
    if not self._done_cost:
      return None
    return sum(self._left.values()) / self._done_cost * (self._clock() - self._start)

  def _line(self, run: Run) -> str:
    lines = read_lines(self._folder / run.key / 'metrics.jsonl')
    if not lines:
      return f'{run.name}: starting'
    last = lines[-1]
    return f'{run.name}: step {last["step"] + 1}/{run.settings.steps}, loss {last["loss"] or float("nan"):.4f}'

  def _left_text(self) -> str:
    left = self.seconds_left()
    failed = f', {self._failed} failed' if self._failed else ''
    return (f'{clock_time(left)} left' if left is not None else 'time left unknown') + failed

  def _tell(self, text: str) -> None:
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
      return
    done = self._total - len(self._left)
    print(f'{done}/{self._total} {text}; {self._left_text()}', file=self._stream, flush=True)
