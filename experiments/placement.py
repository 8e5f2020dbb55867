"""Where the experts of a trained model should lie: crossings and loads before and after, on tokens that it routes.

  python -m experiments.placement --workdir DIR --devices=2,4,8 [--batches=8] [--slots=0] [--out DIR]

prints one JSON object a number of devices; `--out` writes them and a page to a folder. Crossings are the share of
(token, choice in a layer, choice in the next) whose experts lie on different devices: what has to travel where the
token's vector follows its experts (ExFlow). The placement is found on half of the batches and judged on the others.
Imbalance is the load of the fullest device over the mean, of the worst layer, with `--slots` places a device for copies
of hot experts (0: a quarter more than the experts need).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from experiments import cli, workdir
from experiments.build import assemble
from experiments.checkpoint import Checkpoints
from experiments.errors import BadInput
from experiments.studies import rows
from moejax.placement import (
  affinity_placement,
  choices_of,
  crossings,
  identity_placement,
  loads,
  replicate,
  transitions,
)
from moejax.placement.routing_trace import routing_trace
from moejax.transformer.decoder import Decoder

TRAIN = (
  'scripts/python -m experiments.train --config configs/tiny.py --config.model.moe.layers=all --config.steps=200 '
  '--config.eval.every=0 --workdir runs/place'
)
"""The model of experiments/results/placement."""


def main(argv: list[str]) -> int:
  settings, _, folder, own = cli.parse(
    argv,
    'experiments.placement',
    _define,
    workdir='a run, whose newest checkpoint routes; nothing is written there',
  )
  moe = settings.model.moe
  wanted = [_at_least(2, 'devices', devices) for devices in own['devices']]
  _at_least(2, 'batches', own['batches'])
  _at_least(0, 'slots', own['slots'])
  experts = moe.num_experts * moe.granularity
  for devices in wanted:
    if experts % devices:
      raise BadInput(f'--devices={devices} does not divide the {experts} experts of a layer')
  absent = BadInput(
    f'--workdir={folder} has no checkpoint of a model to place: give the folder of a run'
  )
  if not (folder / 'checkpoints').is_dir():
    raise absent
  parts = assemble(settings)
  with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
    restored = checkpoints.restore(parts.program.abstract)
  if restored is None:
    raise absent
  state, _ = restored
  model = parts.program.definition.model(state.params, state.routing)
  if not isinstance(model, Decoder):
    raise BadInput(
      f'model.kind={settings.model.kind!r} is not placed: accepted are decoder, encoder'
    )
  if own['out']:
    out = workdir.make_folder(Path(own['out']), '--out')
  choices = []
  for index in range(min(own['batches'], parts.eval_stream.num_batches)):
    batch = parts.eval_stream.batch(index)
    inputs = {'positions': batch['positions'], 'segment_ids': batch['segment_ids']}
    trace = routing_trace(model, batch['tokens'], mask=batch['segment_ids'] > 0, **inputs)
    choices.append(choices_of(trace))
  width = 4 if settings.model.dtype == 'float32' else 2
  reports = []
  for devices in wanted:
    try:
      report = judged(np.stack(choices), experts, devices, own['slots'])
    except ValueError as error:
      raise BadInput(str(error)) from error
    for name in ('before', 'after'):
      report[f'bytes_per_token_{name}'] = (
        report[f'crossings_{name}'] * report['pairs_per_token'] * settings.model.d_model * width
      )
    reports.append(report)
    print(json.dumps(report))
  if own['out']:
    result = {
      'command': ' '.join(['scripts/python -m experiments.placement', *argv[1:]]),
      'machine': rows.machine(),
      'config': workdir.read_json(workdir.config_path(folder)),
      'rows': reports,
    }
    workdir.write_text(out / 'result.json', json.dumps(result, indent=1) + '\n')
    workdir.write_text(out / 'README.md', page(result))
  return 0


def _at_least(least: int, flag: str, value: Any) -> int:
  if not str(value).isdigit() or int(value) < least:
    raise BadInput(f'--{flag}={value} is not accepted: accepted are integers from {least}')
  return int(value)


def page(result: Mapping[str, Any]) -> str:
  """README.md of a folder."""
  config, found = result['config'], result['rows']
  moe = config['model']['moe']
  saved = [1 - row['crossings_after'] / row['crossings_before'] for row in found]
  head = (
    'devices | crossings by chance | in the order of the experts | by affinity | bytes a token before | after | '
    'imbalance before | with copies'
  ).split(' | ')
  lines = [
    f'| {row["devices"]} | {row["crossings_by_chance"]:.1%} | {row["crossings_before"]:.1%} '
    f'| {row["crossings_after"]:.1%} | {row["bytes_per_token_before"]:,.0f} | {row["bytes_per_token_after"]:,.0f} '
    f'| {row["imbalance_before"]:.2f} | {row["imbalance_after"]:.2f} |'
    for row in found
  ]
  table = '\n'.join([f'| {" | ".join(head)} |', '|---' * len(head) + '|', *lines])
  return (
    '# Where the experts of a small trained model should lie\n\n'
    f'Routing of a language model after {config["steps"]} steps ({found[0]["layers"]} mixtures of {moe["num_experts"]} '
    f'experts, {moe["router"]["name"]}): placements are found on as many tokens of `{config["data"]["name"]}` as they '
    f'are judged on, {found[0]["tokens"]:,} others; it was trained on neither.\n\n'
    'Crossings are the share of (token, choice in a layer, choice in the next) whose experts lie on different devices; '
    'bytes are of the vectors that so have to travel, one a pair of choices. *Copies* fill the places of a device, '
    'a quarter more than the experts need and rounded up, with the most loaded ones; imbalance is the load of the '
    f'fullest device over the mean, of the worst layer.\n\n{table}\n\n'
    f'ExFlow (Yao et al. 2024) reports up to 67 % less routing between GPUs; here affinity saves {min(saved):.0%} to '
    f'{max(saved):.0%}, with one model and one seed, on {result["machine"]}.\n\n'
    f'```sh\n{TRAIN}\n{result["command"]}\n```\n'
  )


def judged(choices: np.ndarray, num_experts: int, devices: int, slots: int = 0) -> dict[str, float]:
  """Crossings and imbalance before and after.

  Args:
    choices: `[batches, T, L, K]`, see `moejax.placement.choices_of`; of an odd number the last is left out.
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
  found, fresh = (np.concatenate(part) for part in (choices[:half], choices[half : 2 * half]))
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
  flags.DEFINE_list(
    'devices', ['4'], 'devices that the experts are spread over, such as 2,4,8', flag_values=values
  )
  flags.DEFINE_string(
    'out',
    '',
    'folder of result.json and README.md; else nothing is written',
    flag_values=values,
  )
  flags.DEFINE_integer('batches', 8, 'batches of the evaluation data to route', flag_values=values)
  flags.DEFINE_integer(
    'slots', 0, 'places of a device for copies; 0: a quarter more', flag_values=values
  )


if __name__ == '__main__':
  cli.run(main)
