"""Settings that came after runs had been made, each with the value at which a run is what it was without it.

A run's hash leaves them out at that value, so that a sweep's finished runs keep their folders; a config.json from
before them is read as if it had them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

LATER: dict[str, Any] = {
  'compiler': {},
  'mesh.tensor': 1,
  'model.attention': 'grouped',
  'model.latent': {'q_rank': 0, 'kv_rank': 0, 'rotary_dim': 0, 'value_dim': 0},
  'model.qk_norm_scope': 'head',
  'model.rope_theta': 10_000.0,
  'model.vocab_size': 0,
  'model.moe.kind': 'experts',
  'model.moe.shared_mix': False,
  'model.moe.zero_cost': 1.0,
  'model.moe.zero_experts': {},
  'model.moe.options': {},
  'model.moe.momentum': {},
  'model.moe.exchange_options': {},
  'optim.average_rate': 0.0,
  'optim.consistency': 0.0,
  'data.augment': 'shift',
  'data.eval_crop': 1.0,
  'model.positions': 'rotary',
  'model.output': 'softmax',
  'model.head_bias': 0.0,
  'optim.name': 'adamw',
  'optim.adafactor': {'clip_threshold': 1.0, 'parameter_scale': True, 'factor_from': 128},
  'optim.decay_of': {},
  'model.heads': {
    'num_experts': 8,
    'options': {},
    'router': {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk_norm_sg'},
    'losses': {},
  },
  'model.depth': {'layers': 'none', 'capacity': 0.125, 'decide': 'predictor', 'loss': 0.01},
  'model.moe.pyramid': '',
  'model.moe.implementation': 'auto',
}
"""'section.key' -> value. A test holds them to configs/common.py."""


def without_later(values: Mapping[str, Any]) -> dict[str, Any]:
  """The config without those of `LATER` that have their value: what a run's hash is of."""
  result = copy.deepcopy(dict(values))
  for dotted, usual in LATER.items():
    section, key = _section_of(result, dotted)
    if section.get(key) == usual:
      del section[key]
  return result


def with_later(values: Mapping[str, Any]) -> dict[str, Any]:
  """The config with those of `LATER` that it lacks; what is no section is left for others to refuse."""
  result = copy.deepcopy(dict(values))
  for dotted, usual in LATER.items():
    section, key = _section_of(result, dotted)
    section.setdefault(key, copy.deepcopy(usual))
  return result


def _section_of(config: dict[str, Any], dotted: str) -> tuple[dict[str, Any], str]:
  """The section that holds the key, an empty one where there is none, and the key's last part."""
  *sections, key = dotted.split('.')
  for name in sections:
    config = config.get(name, {}) if isinstance(config, dict) else {}
  return (config if isinstance(config, dict) else {}), key
