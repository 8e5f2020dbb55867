"""Settings that came after runs had been made, each with the value at which a run is what it was without it.

A run's hash leaves them out at that value, so that a sweep's finished runs keep their folders; a config.json from
before them is read as if it had them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

LATER: dict[str, Any] = {
  'data.augment': 'shift',
  'data.eval_crop': 1.0,
  'model.positions': 'rotary',
  'model.output': 'softmax',
  'model.head_bias': 0.0,
  'optim.name': 'adamw',
  'optim.adafactor': {'clip_threshold': 1.0, 'parameter_scale': True, 'factor_from': 128},
  'optim.decay_of': {},
}
"""'section.key' -> value; sections are of one level. A test holds them to configs/common.py."""


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
  """The config without those of `LATER` that have their value: what a run's hash is of."""
  result = dict(values)
  for dotted, usual in LATER.items():
    section, _, key = dotted.partition('.')
    inside = result.get(section)
    if isinstance(inside, Mapping) and inside.get(key) == usual:
      result[section] = {name: value for name, value in inside.items() if name != key}
  return result


def with_later(values: Mapping[str, Any]) -> dict[str, Any]:
  """The config with those of `LATER` that it lacks; what is no section is left for others to refuse."""
  result = dict(values)
  for dotted, usual in LATER.items():
    section, _, key = dotted.partition('.')
    inside = result.get(section)
    if isinstance(inside, Mapping) and key not in inside:
      result[section] = {**inside, key: copy.deepcopy(usual)}
  return result
