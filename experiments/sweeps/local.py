"""Runs of a sweep on this machine: a pool of worker processes, each on its own cores."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.sweeps.plan import Run
from experiments.sweeps.worker import OUTPUT

_ACCELERATORS = ('/dev/nvidia0', '/dev/accel0', '/dev/vfio/0')


def default_workers() -> int:
  """One for a machine with an accelerator, else one a core."""
  on_cpu = os.environ.get('JAX_PLATFORMS') == 'cpu'
  if not on_cpu and any(Path(device).exists() for device in _ACCELERATORS):
    return 1
  return len(os.sched_getaffinity(0))


def shares(workers: int) -> list[list[int]]:
  """The cores of each worker: disjoint as long as there are enough."""
  cores = sorted(os.sched_getaffinity(0))
  if workers >= len(cores):
    return [[cores[index % len(cores)]] for index in range(workers)]
  return [cores[index::workers] for index in range(workers)]


class Pool:
  """Trains runs on `workers` processes; a process that dies fails its run and is replaced.

  Args:
    folder: of the sweep; a run's folder in it is named by its key.
    workers: processes.
    on_start: called with a run when a worker takes it.
    on_end: called with a run and its result, or with the reason as a str. Both are called under one lock.
  """

  def __init__(
    self,
    folder: Path,
    workers: int,
    on_start: Callable[[Run], None],
    on_end: Callable[[Run, dict[str, Any] | str], None],
  ):
    self._folder, self._shares = folder, shares(workers)
    self._on_start, self._on_end = on_start, on_end
    self._lock = threading.Lock()
    self._processes: list[subprocess.Popen] = []
    self._stopping = threading.Event()

  def __call__(self, runs: Sequence[Run], shape: Callable[[Run], Any]) -> None:
    """Trains all; a worker prefers runs whose `shape` it has had.

    Ctrl-C ends the workers, and waits until each has saved its run, which resumes from there when the sweep is started
    again.
    """
    waiting = list(runs)
    threads = [
      threading.Thread(target=self._serve, args=(cores, waiting, shape), daemon=True)
      for cores in self._shares
    ]
    for thread in threads:
      thread.start()
    try:
      for thread in threads:
        thread.join()
    except BaseException:
      with self._lock:
        self._stopping.set()
      raise
    finally:
      for process in self._processes:
        process.terminate()
      for process in self._processes:
        process.wait()

  def _serve(self, cores: list[int], waiting: list[Run], shape: Callable[[Run], Any]) -> None:
    process: subprocess.Popen | None = None
    known = None
    while (run := self._take(waiting, shape, known)) is not None:
      known = shape(run)
      process = process or self._start(cores)
      if process is None:
        return
      result = self._train(process, run)
      if isinstance(result, str):
        process, known = None, None
      with self._lock:
        if not self._stopping.is_set():  # a run that was stopped has not failed
          self._on_end(run, result)
    if process is not None:
      _end(process)

  def _take(self, waiting: list[Run], shape: Callable[[Run], Any], known: Any) -> Run | None:
    """A run of the shape that the worker knows, else the first of the shape with the most runs left."""
    with self._lock:
      if not waiting or self._stopping.is_set():
        return None
      shapes = [shape(run) for run in waiting]
      best = known if known in shapes else max(shapes, key=shapes.count)
      run = waiting.pop(shapes.index(best))
      self._on_start(run)
      return run

  def _start(self, cores: list[int]) -> subprocess.Popen | None:
    """A worker; none while the pool ends."""
    names = ','.join(map(str, cores))
    with self._lock:
      if self._stopping.is_set():
        return None
      process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.sweeps.worker', '--cores', names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
      )
      self._processes.append(process)
    return process

  def _train(self, process: subprocess.Popen, run: Run) -> dict[str, Any] | str:
    """The run's result, or why there is none."""
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    job = {'config': run.config, 'folder': str(self._folder / run.key)}
    try:
      process.stdin.write(json.dumps(job) + '\n')
      process.stdin.flush()
    except BrokenPipeError:
      return self._reason(process, run)
    answer = process.stdout.readline()
    return json.loads(answer) if answer else self._reason(process, run)

  def _reason(self, process: subprocess.Popen, run: Run) -> str:
    code = _end(process)
    file = self._folder / run.key / OUTPUT
    lines = file.read_text(errors='replace').split('\n') if file.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), 'nothing was printed')
    return f'the process ended with code {code}: {last}'


def _end(process: subprocess.Popen) -> int:
  """Lets a worker end, which it does when it can read no more jobs; its exit code."""
  assert process.stdin is not None and process.stdout is not None  # both are pipes
  with contextlib.suppress(BrokenPipeError):
    process.stdin.close()
  code = process.wait()
  process.stdout.close()
  return code
