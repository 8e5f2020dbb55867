"""Evaluates a trained model, inside a training run or as a program on its checkpoints.

  python -m experiments.evaluate --workdir DIR [--config.eval.batches=100]

prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import cli
from experiments.build import Experiment, assemble
from experiments.checkpoint import Checkpoints
from experiments.data import Stream, prefetch
from experiments.errors import BadInput
from experiments.place import place_batch
from experiments.program import Program
from experiments.settings import Settings


class Evaluation:
  """Mean loss and accuracy over the first batches of a stream; compiled once.

  Args:
    program: the model.
    stream: evaluation stream, one pass in a fixed order.
    batches: at most so many.
    bits_per_byte: report this too, of a causal model on bytes.
  """

  def __init__(self, program: Program, stream: Stream, batches: int, bits_per_byte: bool):
    self._program = program
    self._stream = stream
    self._batches = min(batches, stream.num_batches)
    self._bits_per_byte = bits_per_byte

  def __call__(self, params: Any, routing: Any) -> dict[str, float]:
    """eval_loss in nats a prediction, eval_accuracy, and for byte-level text eval_bits_per_byte."""
    sums = np.zeros(3)  # float64: a float32 sum of many batches would lose the last of them
    with contextlib.closing(prefetch(self._stream, 0, self._batches)) as batches:
      for rows in batches:
        batch = place_batch(self._program.mesh, rows)
        found = self._program.eval_step(params, routing, batch)
        sums += jax.device_get((found.loss, found.correct, found.count))
    loss, correct, count = map(float, sums)
    result = {'eval_loss': loss / max(count, 1), 'eval_accuracy': correct / max(count, 1)}
    if self._bits_per_byte:
      result['eval_bits_per_byte'] = result['eval_loss'] / math.log(2)
    return result


def told(found: Mapping[str, float]) -> str:
  """'loss 2.1163, accuracy 0.3850, bits per byte 3.0531' of what an Evaluation returns."""
  names = (name.removeprefix('eval_').replace('_', ' ') for name in found)
  return ', '.join(f'{name} {value:.4f}' for name, value in zip(names, found.values(), strict=True))


def make_evaluation(settings: Settings, parts: Experiment) -> Evaluation:
  """The evaluation that `settings.eval` asks for."""
  return Evaluation(
    parts.program,
    parts.eval_stream,
    settings.eval.batches,
    bits_per_byte=settings.data.objective == 'causal' and settings.data.tokenizer == 'bytes',
  )


def main(argv: list[str]) -> int:
  settings, _, folder, _ = cli.parse(
    argv,
    'experiments.evaluate',
    workdir='a run, whose newest checkpoint is evaluated; nothing is written',
  )
  absent = BadInput(f'--workdir={folder} has no checkpoint to evaluate: give the folder of a run')
  if not (folder / 'checkpoints').is_dir():
    raise absent
  parts = assemble(settings)
  with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
    restored = checkpoints.restore(parts.program.abstract)
  if restored is None:
    raise absent
  state, _ = restored
  evaluate = make_evaluation(settings, parts)
  print(json.dumps({'step': int(state.step), **evaluate(state.params, state.routing)}))
  return 0


if __name__ == '__main__':
  cli.run(main)
