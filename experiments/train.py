"""Trains a model. Reads top to bottom: config, mesh, data, model, state, steps, evaluation, checkpoint, report.

  python -m experiments.train --config configs/tiny.py [--config.key=value ...] [--workdir DIR]

Running the same command again resumes from the last checkpoint of DIR. For one run in several processes see
distributed.py.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from experiments import cli, distributed, workdir
from experiments.allocator import keep_freed_memory
from experiments.build import Experiment, assemble
from experiments.checkpoint import Checkpoints
from experiments.data import check_fingerprint, prefetch
from experiments.errors import NonFiniteError
from experiments.evaluate import make_evaluation, told
from experiments.flops import active_share, training_flops
from experiments.log import make_writer, no_writer, read_lines
from experiments.place import place_batch
from experiments.program import Program
from experiments.progress import Progress, compiling
from experiments.report import write_report
from experiments.settings import Settings
from experiments.state import TrainState
from experiments.step import controls
from moejax.transformer.flops import count_params

MAX_SKIPPED_IN_A_ROW = 10


def main(argv: list[str]) -> int:
  keep_freed_memory()
  settings, config, folder, own = cli.parse(argv, 'experiments.train', distributed.define_flags)
  with distributed.joined(**own):
    train(settings, config, Path(distributed.agreed(config, str(folder))))
  return 0


def train(
  settings: Settings,
  config: Mapping[str, Any],
  folder: Path,
  programs: dict[str, Program] | None = None,
) -> Experiment:
  """Trains in `folder`, or goes on there. In a run of several processes each calls this, and the first writes.

  Args:
    settings: of `config`.
    config: what the folder's config.json will hold.
    folder: the workdir.
    programs: see `assemble`.

  Returns:
    The data and the program of the run.
  """
  if distributed.is_first():
    workdir.check(folder, config)  # data may take minutes to be prepared
  parts = assemble(settings, programs)
  program = parts.program
  control = controls(settings.optim, settings.seed, settings.steps)
  evaluate = make_evaluation(settings, parts)

  with contextlib.ExitStack() as stack:
    if distributed.is_first():
      stack.enter_context(workdir.opened(folder, config))
    checkpoints = stack.enter_context(
      Checkpoints(folder / 'checkpoints', keep=settings.checkpoint.keep)
    )
    state, first_step = restore_or_init(checkpoints, parts, settings)
    if distributed.is_first():
      workdir.write_config(folder, config)
    announce(folder, state, parts, first_step, settings.steps)
    meta = {'config': config, 'data': parts.train_stream.fingerprint}
    batches = prefetch(parts.train_stream, first_step, settings.steps)
    stack.enter_context(contextlib.closing(batches))
    make = make_writer if distributed.is_first() else no_writer
    writer = stack.enter_context(contextlib.closing(make(folder, settings.log, first_step)))
    stop = stack.enter_context(stop_requested())
    progress = stack.enter_context(contextlib.closing(make_progress(settings, parts, first_step)))
    profile = settings.profile and distributed.is_first()
    for step, rows in zip(range(first_step, settings.steps), batches, strict=True):
      batch = place_batch(program.mesh, rows)
      if not program.is_compiled:
        with compiling('the training step'), progress.paused():
          program.compile(state, batch, control(step))
      with profiled(profile and step - first_step == 5, folder):
        state, metrics = program.train_step(state, batch, control(step))
        if profile:
          jax.block_until_ready(metrics)
      done = step + 1
      last = done == settings.steps
      evaluates = last or is_due(settings.eval.every, done)
      if evaluates or is_due(settings.log.every, done):
        metrics = jax.device_get(metrics)
        refuse_non_finite(metrics, step)
        metrics['learning_rate'] = control(step).learning_rate
        timed = progress.update(done, float(metrics['loss']))
        if evaluates:
          with progress.paused():
            found = evaluate(state.params, state.routing)
          progress.note(f'step {done}/{settings.steps}, evaluation: {told(found)}')
          metrics |= found
        if done <= settings.log.every:
          metrics |= parameter_counts(settings, parts, state)
        writer.write(step, metrics, timed)
      else:
        progress.update(done)
      stopping = stop.after(done)
      if last or stopping or is_due(settings.checkpoint.every, done):
        checkpoints.save(done, state, meta)
      if stopping and not last:
        progress.note(f'Stopped after step {done} as asked; the same command goes on from here')
        break

  if settings.log.report and distributed.is_first() and read_lines(folder / 'metrics.jsonl'):
    write_report(folder)  # of a run that was stopped before its first line there is none
    print(f'Report: {folder / "report.html"}', file=sys.stderr)
  return parts


def is_due(every: int, done: int) -> bool:
  """Whether something that happens every so many steps (0: never) happens after `done` of them."""
  return every > 0 and done % every == 0


def restore_or_init(
  checkpoints: Checkpoints, parts: Experiment, settings: Settings
) -> tuple[TrainState, int]:
  """The state to go on from, and its step.

  Raises:
    DataMismatch: the data stream is not the one that the run began with.
  """
  restored = checkpoints.restore(parts.program.abstract)
  if restored is None:
    return parts.program.init(jax.random.key(settings.seed)), 0
  state, meta = restored
  if not settings.data.allow_changed_stream:
    check_fingerprint(meta['data'], parts.train_stream.fingerprint)
  return state, int(state.step)


def make_progress(settings: Settings, parts: Experiment, first_step: int) -> Progress:
  """Progress in tokens, or in images."""
  images = parts.train_stream.image_shape is not None
  per_record = 1 if images else settings.data.sequence_length
  return Progress(
    settings.steps,
    first_step,
    tokens_per_step=settings.batch_size * per_record,
    flops_per_step=training_flops(settings, parts.train_stream),
    device_kind=parts.program.mesh.devices.flat[0].device_kind,
    num_devices=parts.program.mesh.size,
    unit='images' if images else 'tokens',
  )


def parameter_counts(settings: Settings, parts: Experiment, state: TrainState) -> dict[str, int]:
  """All parameters, and those that work on one token: a mixture counts with the experts of a token."""
  counts = count_params(state.params)
  experts = counts.get('moe/experts', 0)
  share = active_share(settings, parts.train_stream) if experts else 0.0
  active = counts['total'] - round(experts * (1 - share))
  return {'parameters': counts['total'], 'active_parameters': active}


def announce(
  folder: Path, state: TrainState, parts: Experiment, first_step: int, steps: int
) -> None:
  """One line about what is going to happen."""
  begin = f'resuming at step {first_step}' if first_step else 'starting'
  if first_step >= steps:
    begin = f'all {steps} steps are done (more: --config.steps=N)'
  count = count_params(state.params)['total']
  stream, mesh = parts.train_stream, parts.program.mesh
  print(
    f'{folder}: {begin}; {count:,} parameters on '
    f'{mesh.size} x {mesh.devices.flat[0].device_kind}; {stream.num_records:,} records of '
    f'{stream.fingerprint["dataset"]}',
    file=sys.stderr,
  )


def refuse_non_finite(metrics: dict[str, Any], step: int) -> None:
  """Ends a run whose last steps were all skipped; the last checkpoint is good.

  Raises:
    NonFiniteError: too many in a row.
  """
  in_a_row = int(metrics['skipped_in_a_row'])
  if in_a_row >= MAX_SKIPPED_IN_A_ROW:
    raise NonFiniteError(
      f'loss or gradient was not finite in {in_a_row} steps in a row, the last at step {step}: lower '
      'optim.learning_rate or look at the data of these steps'
    )


class Stop:
  """Whether somebody asked the run to end."""

  requested = False

  def after(self, done: int) -> bool:
    """Whether this step, which every process calls this after, is the last."""
    return distributed.stop_agreed(done) if jax.process_count() > 1 else self.requested


@contextlib.contextmanager
def stop_requested() -> Iterator[Stop]:
  """Turns the first SIGTERM or Ctrl-C into a clean end after the step; the second one ends at once.

  In a run of several processes, a SIGTERM to any of them ends all after the same step; Ctrl-C ends at once.
  """
  stop = Stop()
  if jax.process_count() > 1:
    yield stop
    return

  def ask(number, frame):
    stop.requested = True
    signal.signal(number, previous[number])

  previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    for number in previous:
      signal.signal(number, ask)
    yield stop
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def profiled(on: bool, folder: Path) -> Iterator[None]:
  """Writes a trace of what runs inside to `folder/profile`."""
  if not on:
    yield
    return
  with jax.profiler.trace(str(folder / 'profile'), create_perfetto_trace=True):
    yield


if __name__ == '__main__':
  cli.run(main)
