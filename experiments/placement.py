"""Where the experts of a trained model should lie: crossings and loads before and after, on tokens that it routes.

  python -m experiments.placement --workdir DIR --devices=4 [--batches=8] [--slots=0]

prints one JSON object. Crossings are the share of (token, choice in a layer, choice in the next) whose experts lie on
different devices: what has to travel where the token's vector follows its experts (ExFlow). The placement is found on
half of the batches and judged on the others. Imbalance is the load of the fullest device over the mean, of the worst
layer, with `--slots` places a device for copies of hot experts (0: a quarter more than the experts need).
"""

from __future__ import annotations

import json

import numpy as np
from absl import flags

from experiments import cli
from experiments.build import assemble
from experiments.checkpoint import Checkpoints
from experiments.errors import BadInput
from moejax.placement import (
  affinity_placement,
  choices_of,
  crossings,
  identity_placement,
  loads,
  replicate,
  transitions,
)
from moejax.transformer.decoder import Decoder
from moejax.transformer.trace import routing_trace


def main(argv: list[str]) -> int:
  settings, _, folder, own = cli.parse(argv, 'experiments.placement', _define)
  moe = settings.model.moe
  parts = assemble(settings)
  if not (folder / 'checkpoints').is_dir():
    raise BadInput(f'--workdir={folder} has no checkpoint of a model to place')
  with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
    restored = checkpoints.restore(parts.program.abstract)
  if restored is None:
    raise BadInput(f'--workdir={folder} has no checkpoint of a model to place')
  state, _ = restored
  model = parts.program.definition.model(state.params, state.routing)
  if not isinstance(model, Decoder):
    raise BadInput(
      f'model.kind={settings.model.kind!r} is not placed: accepted are decoder, encoder'
    )
  choices = []
  for index in range(min(own['batches'], parts.eval_stream.num_batches)):
    batch = parts.eval_stream.batch(index)
    inputs = {'positions': batch['positions'], 'segment_ids': batch['segment_ids']}
    trace = routing_trace(model, batch['tokens'], mask=batch['segment_ids'] > 0, **inputs)
    choices.append(choices_of(trace))
  try:
    report = judged(
      np.stack(choices), moe.num_experts * moe.granularity, own['devices'], own['slots']
    )
  except ValueError as error:
    raise BadInput(str(error)) from error
  width = 4 if settings.model.dtype == 'float32' else 2
  for name in ('before', 'after'):
    report[f'bytes_per_token_{name}'] = (
      report[f'crossings_{name}'] * report['pairs_per_token'] * settings.model.d_model * width
    )
  print(json.dumps(report))
  return 0


def judged(choices: np.ndarray, num_experts: int, devices: int, slots: int = 0) -> dict[str, float]:
  """Crossings and imbalance before and after.

  Args:
    choices: `[batches, T, L, K]`, see `moejax.placement.choices_of`.
    num_experts: E.
    devices: P.
    slots: of a device, for copies; 0 for a quarter more than E / P.

  Raises:
    ValueError: one batch or one layer, or experts that do not divide over the devices.
  """
  if len(choices) < 2:
    raise ValueError(
      f'--batches={len(choices)} is not accepted: it must be at least 2, one half to judge by'
    )
  half = len(choices) // 2
  found, fresh = (np.concatenate(part) for part in (choices[:half], choices[half:]))
  layers, k = choices.shape[2:]
  before = identity_placement(layers, num_experts, devices)
  after = affinity_placement(transitions(found, num_experts), devices)
  weights = transitions(fresh, num_experts)
  seen, load = loads(found, num_experts), loads(fresh, num_experts)
  slots = slots or -(-5 * num_experts // (4 * devices))
  return {
    'devices': devices,
    'tokens': len(fresh),
    'layers': layers,
    'pairs_per_token': (layers - 1) * k * k,
    'crossings_before': crossings(weights, before),
    'crossings_after': crossings(weights, after),
    'crossings_by_chance': 1 - 1 / devices,
    'slots': slots,
    'imbalance_before': max(
      _imbalance(one, before[0].reshape(devices, -1).shape[1]) for one in load
    ),
    'imbalance_after': max(
      _shared(one, replicate(past, devices, slots).expert)
      for one, past in zip(load, seen, strict=True)
    ),
  }


def _imbalance(load: np.ndarray, own: int) -> float:
  """Of experts that lie in their own order, `own` on a device."""
  of_device = load.reshape(-1, own).sum(1)
  return float(of_device.max() / of_device.mean())


def _shared(load: np.ndarray, expert: np.ndarray) -> float:
  """Of copies `[P, slots]` that share the rows of their expert evenly."""
  copies = np.bincount(expert.ravel(), minlength=len(load))
  of_device = (load / copies)[expert].sum(1)
  return float(of_device.max() / of_device.mean())


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_integer('devices', 4, 'devices that the experts are spread over', flag_values=values)
  flags.DEFINE_integer('batches', 8, 'batches of the evaluation data to route', flag_values=values)
  flags.DEFINE_integer(
    'slots', 0, 'places of a device for copies; 0: a quarter more', flag_values=values
  )


if __name__ == '__main__':
  cli.run(main)
