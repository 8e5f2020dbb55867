"""Runs of a sweep beyond this machine: SLURM through submitit, a cluster through Ray. Both only call `run_one`.

Workers must see the sweep's folder under the same path, and the code.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.errors import BadInput
from experiments.sweeps import worker
from experiments.sweeps.plan import Run

_POLL_SECONDS = 1.0
Outcome = dict[str, Any] | str


def run_one(config: Mapping[str, Any], folder: str) -> dict[str, Any]:
  """Trains one run in a process of the engine's."""
  return worker.run(config, Path(folder), {})


class Submitit:
  """Each run is a job of submitit (Meta): SLURM where there is one, else processes of this machine.

  SLURM's own options are taken from the environment: MOEJAX_SLURM='partition=gpu,gpus_per_node=1,time=120'.

  Args:
    folder: of the sweep.
    workers: jobs at a time.
    on_start, on_end: as of `local.Pool`.

  Raises:
    BadInput: submitit is not installed.
  """

  def __init__(
    self,
    folder: Path,
    workers: int,
    on_start: Callable[[Run], None],
    on_end: Callable[[Run, Outcome], None],
  ):
    try:
      import submitit
    except ImportError as error:
      raise BadInput("--backend=submitit needs the extra 'slurm': MOEJAX_EXTRAS=slurm") from error
    self._failure = submitit.core.utils.UncompletedJobError
    self._executor = submitit.AutoExecutor(folder=str(folder / 'submitit'))
    self._executor.update_parameters(timeout_min=60, **slurm_options())
    self._folder, self._workers = folder, workers
    self._on_start, self._on_end = on_start, on_end

  def __call__(self, runs: Sequence[Run], shape: Callable[[Run], Any]) -> None:
    """Trains all, at most `workers` at a time; `shape` is of no use to jobs of their own."""
    waiting = list(runs)
    jobs: dict[Any, Any] = {}
    while waiting or jobs:
      while waiting and len(jobs) < self._workers:
        run = waiting.pop(0)
        jobs[run.key] = (
          run,
          self._executor.submit(run_one, run.config, str(self._folder / run.key)),
        )
        self._on_start(run)
      time.sleep(_POLL_SECONDS)
      for key in [key for key, (_, job) in jobs.items() if job.done()]:
        run, job = jobs.pop(key)
        self._on_end(run, self._outcome(job))

  def _outcome(self, job: Any) -> Outcome:
    failure = job.exception()
    if failure is None:
      return job.result()
    return f'job {job.job_id}: {str(failure).strip().splitlines()[-1]}'


def slurm_options() -> dict[str, str]:
  """MOEJAX_SLURM as submitit's parameters, each with its prefix slurm_.

  Raises:
    BadInput: an item that is not key=value.
  """
  options = {}
  for item in filter(None, os.environ.get('MOEJAX_SLURM', '').split(',')):
    key, equals, value = item.partition('=')
    if not equals:
      raise BadInput(f'MOEJAX_SLURM={item!r} is not accepted: it must be key=value,key=value')
    options[f'slurm_{key.strip()}'] = value.strip()
  return options


class Ray:
  """Each run is a task of Ray: on the cluster that RAY_ADDRESS names, else on this machine.

  Args: as of `Submitit`.

  Raises:
    BadInput: Ray is not installed.
  """

  def __init__(
    self,
    folder: Path,
    workers: int,
    on_start: Callable[[Run], None],
    on_end: Callable[[Run, Outcome], None],
  ):
    try:
      import ray
    except ImportError as error:
      raise BadInput("--backend=ray needs the extra 'ray': MOEJAX_EXTRAS=ray") from error
    self._ray = ray
    self._folder, self._workers = folder, workers
    self._on_start, self._on_end = on_start, on_end

  def __call__(self, runs: Sequence[Run], shape: Callable[[Run], Any]) -> None:
    """Trains all, at most `workers` at a time."""
    ray = self._ray
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    task = ray.remote(max_retries=0)(run_one)
    waiting = list(runs)
    jobs: dict[Any, Any] = {}
    while waiting or jobs:
      while waiting and len(jobs) < self._workers:
        run = waiting.pop(0)
        jobs[task.remote(dict(run.config), str((self._folder / run.key).resolve()))] = run
        self._on_start(run)
      (done,), _ = ray.wait(list(jobs), num_returns=1)
      run = jobs.pop(done)
      try:
        outcome: Outcome = ray.get(done)
      except ray.exceptions.RayError as error:
        outcome = f'task: {str(error).strip().splitlines()[-1]}'
      self._on_end(run, outcome)
    ray.shutdown()
