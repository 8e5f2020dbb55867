"""What the committed plans are of: configs and machines, steps that were compiled, runs that were published."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from experiments.planning.workload import Layout
from experiments.settings import Settings
from moejax.mesh.make import AXES

ROOT = Path(__file__).resolve().parents[2]

PLANNED: dict[str, tuple[str, ...]] = {
  'mixtral_8x7b': ('v5p:4x4x4', 'h100:8x16'),
  'olmoe_1b_7b': ('v5p:2x2x4', 'h100:8x2'),
  'deepseek_v3_671b': ('v5p:8x8x16', 'b200:8x64', 'h800:8x256'),
  'qwen3_235b': ('v5p:8x8x8', 'h200:8x32'),
  'kimi_1t': ('v5p:16x16x16', 'b200:8x128'),
  'ling_300b': ('v5p:8x8x8', 'h200:8x32'),
}
"""Config -> the topologies it is planned for."""


@dataclasses.dataclass(frozen=True)
class Run:
  """A published training run.

  Attributes:
    tokens: that it trained on.
    hours: device hours that took.
    source: where both are printed.
    differs: what it did that the plan cannot.
  """

  tokens: float
  hours: float
  source: str
  differs: str


RUNS: dict[tuple[str, str], Run] = {
  ('deepseek_v3_671b', 'h800:8x256'): Run(
    14.8e12,
    2664e3,
    'DeepSeek-V3 technical report (arXiv 2412.19437), table 1 and section 1',
    'multiplied in fp8, cut layers over a pipeline, recomputed norms and latent projections alone, sent a token '
    'to 4 nodes at most, and hid the network behind work; the plan sends each of 8 rows by itself, with room for '
    'twice the mean, and again to recompute',
  )
}
"""(config, topology) -> the run to hold the plan to. Nothing in the model is set by it."""


NARROW: dict[str, Any] = {
  'batch_size': 64,
  'data.sequence_length': 512,
  'model.d_model': 1024,
  'model.num_layers': 4,
  'model.num_heads': 8,
  'model.d_ff': 512,
  'model.vocab_size': 8192,
}
"""Changes that make a config of a scale that compiles soon, whatever the size of the whole."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A step that was compiled, to check the analytic model.

  Attributes:
    config, topology, layout: what is compiled, and for what.
    changes: of the config.
    held_out: whether nothing in the model was set by this step: it was predicted first.
  """

  config: str
  topology: str
  layout: Layout
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  held_out: bool = False

  def settings(self) -> Settings:
    return settings_of(self.config, {**self.changes, 'microbatches': self.layout.microbatches})

  @property
  def name(self) -> str:
    if not NARROW.items() <= self.changes.items():
      return self.config
    own = [f'{key}={value}' for key, value in self.changes.items() if key not in NARROW]
    return ' '.join(['narrow', self.config, *own])


def _case(
  config: str,
  topology: str,
  mesh: tuple[int, int, int, int],
  exchange: str,
  microbatches: int,
  changes: Mapping[str, Any] | None = None,
  *,
  held_out: bool = False,
  **options: Any,
) -> Case:
  layout = Layout(dict(zip(AXES, mesh, strict=True)), exchange, microbatches, options)
  return Case(config, topology, layout, changes or {}, held_out)


_OLMOE, _QWEN, _SLICE, _CUBE = 'olmoe_1b_7b', 'qwen3_235b', 'v5p:2x2x4', 'v5p:2x2x2'
_PYRAMID = {**NARROW, 'model.moe.pyramid': '16,16,32,64'}
_DEPTH = {**NARROW, 'model.depth.layers': 'every_2', 'allow_leak': True}
_HEADS = {
  **NARROW,
  'model.attention': 'experts',
  'model.qk_norm': False,
  'model.qk_norm_scope': 'head',
}
CASES: dict[str, Case] = {
  'kimi': _case('kimi_1t', 'v5p:16x16x16', (1, 128, 32, 1), 'all_to_all', 1),
  'mixtral': _case('mixtral_8x7b', 'v5p:4x4x4', (1, 64, 1, 1), 'local', 2),
  'deepseek': _case('deepseek_v3_671b', 'v5p:8x8x16', (1, 128, 8, 1), 'all_to_all', 16),
  'qwen': _case(_QWEN, 'v5p:8x8x8', (1, 256, 1, 2), 'local', 4),
  'ling': _case('ling_300b', 'v5p:8x8x8', (1, 256, 1, 2), 'local', 4),
  'kimi_again': _case('kimi_1t', 'v5p:16x16x16', (1, 256, 16, 1), 'all_to_all', 1, held_out=True),
  'deepseek_again': _case('deepseek_v3_671b', 'v5p:8x8x16', (1, 128, 1, 8), 'local', 16),
  'qwen_again': _case(_QWEN, 'v5p:8x8x8', (1, 512, 1, 1), 'local', 2, held_out=True),
  'ling_again': _case('ling_300b', 'v5p:8x8x8', (1, 256, 1, 2), 'local', 2),
  'olmoe': _case(_OLMOE, _SLICE, (1, 4, 4, 1), 'all_gather', 64),
  'olmoe_data': _case(_OLMOE, _SLICE, (2, 4, 2, 1), 'all_gather', 1, {'batch_size': 16}),
  'olmoe_local': _case(_OLMOE, _SLICE, (1, 16, 1, 1), 'local', 4, held_out=True),
  'tensor': _case(_OLMOE, 'v5e:4x4', (1, 4, 2, 2), 'all_gather', 2, NARROW),
  'tensor_local': _case(_OLMOE, 'v5e:4x4', (2, 4, 1, 2), 'local', 1, NARROW),
  'swap': _case(_OLMOE, _SLICE, (2, 2, 4, 1), 'all_to_all', 2, NARROW, held_out=True),
  'ragged': _case(_OLMOE, _SLICE, (1, 4, 4, 1), 'ragged_all_to_all', 4, NARROW, held_out=True),
  'tensor_swap': _case(_QWEN, _SLICE, (1, 4, 2, 2), 'all_to_all', 1, NARROW, held_out=True),
  'bilevel': _case(_OLMOE, _SLICE, (1, 2, 8, 1), 'bilevel', 2, NARROW, held_out=True, nodes=2),
  'fallback': _case(_OLMOE, _CUBE, (1, 2, 4, 1), 'ragged_fallback', 2, NARROW),
  'sparse': _case(
    _OLMOE,
    _CUBE,
    (1, 2, 4, 1),
    'sparse_fsdp',
    2,
    NARROW,
    held_out=True,
    hot=2,
    capacity_factor=1.25,
  ),
  'pyramid': _case(_OLMOE, _CUBE, (1, 2, 4, 1), 'all_gather', 4, _PYRAMID, held_out=True),
  'depth': _case(_OLMOE, _CUBE, (1, 2, 4, 1), 'all_to_all', 4, _DEPTH, held_out=True),
  'heads': _case(_OLMOE, _CUBE, (1, 2, 4, 1), 'all_gather', 4, _HEADS, held_out=True),
  'tensor_more': _case(_QWEN, 'v5e:4x4', (1, 8, 1, 2), 'local', 2, NARROW),
}
"""Short name -> what is compiled."""


def settings_of(name: str, changes: Mapping[str, Any]) -> Settings:
  """The settings of one scale config with these changes."""
  (config,) = cli.execute(ROOT / f'configs/scale/{name}.py', 'a config', ('get_config',))
  assert isinstance(config, ConfigDict)
  config.update_from_flattened_dict(dict(changes))
  return Settings.from_config(config)
