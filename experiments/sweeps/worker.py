"""A process that trains one run after another; runs of one shape share their compiled programs.

  python -m experiments.sweeps.worker [--cores 0,1]

reads jobs from standard input, a JSON object a line with config and folder, and answers each with the JSON line of its
result. What a run prints goes to output.txt in its folder. A run that raises ends the process: whoever gave the job
finds the reason in output.txt and starts another worker.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OUTPUT = 'output.txt'


def main() -> None:
  if '--cores' in sys.argv:
    cores = sys.argv[sys.argv.index('--cores') + 1]
    os.sched_setaffinity(
      0, {int(core) for core in cores.split(',')}
    )  # before XLA makes its threads
  answers = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  programs: dict[str, Any] = {}
  for line in sys.stdin:
    job = json.loads(line)
    folder = Path(job['folder'])
    folder.mkdir(parents=True, exist_ok=True)
    send_output_to(folder / OUTPUT)
    result = run(job['config'], folder, programs)
    print(json.dumps(result), file=answers, flush=True)


def send_output_to(file: Path) -> None:
  """Standard output and standard error of this process, and of what it calls in C++, go to the end of a file."""
  sys.stdout.flush()
  sys.stderr.flush()
  descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
  os.dup2(descriptor, 1)
  os.dup2(descriptor, 2)
  os.close(descriptor)


def run(config: Mapping[str, Any], folder: Path, programs: dict[str, Any]) -> dict[str, Any]:
  """Trains a config in its folder, writes result.json there and returns it.

  Args:
    config: resolved.
    folder: of the run.
    programs: of runs before it in this process; see `experiments.build.assemble`.

  Raises:
    RunStopped: a signal ended it before its last step; it has no result.
  """
  # JAX is imported here, so that a worker is on its cores before
  from experiments.errors import NonFiniteError, RunStopped
  from experiments.flops import active_share, training_flops
  from experiments.heads import head_facts
  from experiments.log import read_lines
  from experiments.settings import Settings
  from experiments.sweeps import record
  from experiments.train import train
  from moejax.transformer.flops import count_params

  start = time.monotonic()
  before = seconds_told(read_lines(folder / 'metrics.jsonl'))
  settings = Settings.from_config(config)
  status, parts = None, None
  try:
    parts = train(settings, config, folder, programs)
  except NonFiniteError as error:
    print(error, file=sys.stderr)
    status = record.DIVERGED
  lines = read_lines(folder / 'metrics.jsonl')
  last = lines[-1] if lines else {}  # a run can diverge, or be stopped, before its first line
  done = last.get('step', -1) + 1
  if parts is not None and done < settings.steps:  # the last step always leaves a line
    raise RunStopped(f'stopped after its line of step {done} of {settings.steps}')
  metrics = {key: value for key, value in last.items() if not isinstance(value, (list, dict))}
  result: dict[str, Any] = metrics | {'status': status or record.status_of(metrics)}
  if parts is not None:
    stream = parts.train_stream
    heads = head_facts(settings.model)
    images = stream.image_shape is not None
    tokens = settings.steps * settings.batch_size * (1 if images else settings.data.sequence_length)
    result |= record.size(
      settings,
      count_params(parts.program.abstract.params),
      tokens,
      settings.steps * training_flops(settings, stream),
      active_share(settings, stream) if settings.model.moe_layers else 1.0,
      heads.active_share(settings.data.sequence_length) if heads else 1.0,
    )
  # of all processes that trained it: those before this one as far as they told
  result |= {'train_seconds': seconds_told(lines), 'seconds': before + time.monotonic() - start}
  record.write_result(folder, result)
  return result


def seconds_told(lines: Sequence[Mapping[str, Any]]) -> float:
  """The training time in the lines of metrics.jsonl, whose clock begins anew with each process of a resumed run."""
  clock = [line['time']['seconds'] for line in lines]
  return sum(now for now, after in itertools.pairwise([*clock, 0.0]) if now > after)


if __name__ == '__main__':
  main()
