"""An experiment's settings as frozen, checked dataclasses. Defaults live in configs/common.py, and only there.

`Settings.from_config(config)` checks everything that can be checked without a device: keys, types, ranges, and
the rules that tie settings together. Below experiments/ no ConfigDict is seen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from experiments.check_settings import check_model, check_together
from experiments.errors import BadInput
from experiments.later import with_later
from experiments.schema import Rule, read

_at_least_1 = Rule('at least 1', lambda value: value >= 1)
_at_least_2 = Rule('at least 2', lambda value: value >= 2)
_not_negative = Rule('0 or more', lambda value: value >= 0)
_positive = Rule('more than 0', lambda value: value > 0)
_fraction = Rule('between 0 and 1', lambda value: 0 <= value <= 1)
_share = Rule('more than 0 and at most 1', lambda value: 0 < value <= 1)
_below_one = Rule('at least 0 and less than 1', lambda value: 0 <= value < 1)
_seed = Rule('between 0 and 4294967295', lambda value: 0 <= value < 2**32)
_step_count = Rule('between 1 and 2147483647', lambda value: 1 <= value < 2**31)
_filled = Rule('a name', lambda value: bool(value.strip()))
_axis = Rule(
  'at least 1, or -1 for all devices that are left', lambda value: value >= 1 or value == -1
)
_layers = Rule(
  "'none', 'all', 'every_2', 'last_half', 'last_2' or layer indices such as '4,5'",
  lambda value: (
    re.fullmatch(r'none|all|every_[1-9]\d*|last_(?:half|[1-9]\d*)|\d+(,\d+)*', value) is not None
  ),
)

_pyramid = Rule(
  "'' or numbers of experts such as '4,4,8'",
  lambda value: re.fullmatch(r'([1-9]\d*(,[1-9]\d*)*)?', value) is not None,
)


@dataclasses.dataclass(frozen=True)
class DataSettings:
  name: Annotated[str, _filled]
  split: Annotated[str, _filled]
  eval_split: Annotated[str, _filled]
  objective: Literal['causal', 'masked', 'classify']
  sequence_length: Annotated[int, _at_least_1]
  tokenizer: Annotated[str, _filled]
  mask_rate: Annotated[float, _fraction]
  image_size: Annotated[int, _not_negative]
  normalization: Literal['signed', 'standard']
  augment: Literal['shift', 'inception', 'none']
  eval_crop: Annotated[float, _share]
  data_dir: str
  allow_changed_stream: bool


@dataclasses.dataclass(frozen=True)
class MoESettings:
  layers: Annotated[str, _layers]
  kind: Literal['experts', 'residual', 'multi_head', 'cartesian', 'peer', 'deep', 'nested']
  options: dict[str, Any]  # of this kind
  num_experts: Annotated[int, _at_least_1]
  pyramid: Annotated[str, _pyramid]
  d_ff: Annotated[int, _not_negative]  # resolved: never 0 after from_config
  granularity: Annotated[int, _at_least_1]
  num_shared: Annotated[int, _not_negative]
  shared_mix: bool
  zero_experts: dict[str, Annotated[int, _not_negative]]  # how many by kind
  zero_cost: Annotated[float, _not_negative]
  output_norm: bool
  momentum: dict[str, Any]  # 'name' and options; empty for none
  dispatch: Literal['fused', 'sorted', 'einsum']
  implementation: Literal['auto', 'ampere', 'blocks', 'cpu', 'gpu', 'tpu', 'reference']
  exchange: Literal[
    'auto',
    'local',
    'all_gather',
    'all_to_all',
    'ragged_all_to_all',
    'ragged_fallback',
    'bilevel',
    'sparse_fsdp',
  ]
  exchange_options: dict[str, Any]  # of that exchange, checked where it is made
  router: dict[str, Any]  # 'name' and that router's own options
  losses: dict[str, Annotated[float, _not_negative]]  # coefficients by name of the loss


@dataclasses.dataclass(frozen=True)
class LatentSettings:
  q_rank: Annotated[int, _not_negative]
  kv_rank: Annotated[int, _not_negative]
  rotary_dim: Annotated[int, _not_negative]
  value_dim: Annotated[int, _not_negative]


@dataclasses.dataclass(frozen=True)
class HeadSettings:
  num_experts: Annotated[int, _at_least_1]
  options: dict[str, Any]  # of this kind of attention
  router: dict[str, Any]  # 'name' and that router's own options
  losses: dict[str, Annotated[float, _not_negative]]  # coefficients by name of the loss


@dataclasses.dataclass(frozen=True)
class DepthSettings:
  layers: Annotated[str, _layers]
  capacity: Annotated[float, _share]
  decide: Literal['predictor', 'router']
  loss: Annotated[float, _not_negative]


@dataclasses.dataclass(frozen=True)
class ModelSettings:
  kind: Literal['decoder', 'encoder', 'vit']
  d_model: Annotated[int, _at_least_1]
  num_layers: Annotated[int, _at_least_1]
  num_heads: Annotated[int, _at_least_1]
  num_kv_heads: Annotated[int, _not_negative]  # resolved: never 0 after from_config
  head_dim: Annotated[int, _not_negative]  # resolved: never 0 after from_config
  d_ff: Annotated[int, _at_least_1]
  activation: Literal['silu', 'gelu', 'relu', 'relu2']
  gated: bool
  qk_norm: bool
  qk_norm_scope: Literal['head', 'all']
  attention: Literal['grouped', 'latent', 'experts', 'switch_head']
  latent: LatentSettings
  heads: HeadSettings
  positions: Literal['rotary', 'relative']
  rope_theta: Annotated[float, _positive]
  vocab_size: Annotated[int, _not_negative]
  tie_embeddings: bool
  patch_size: Annotated[int, _at_least_1]
  output: Literal['softmax', 'sigmoid']
  head_bias: float
  dtype: Literal['auto', 'float32', 'bfloat16']
  unroll: Annotated[int, _at_least_1]
  remat: Literal['none', 'full', 'dots']
  depth: DepthSettings
  moe: MoESettings

  @property
  def moe_layers(self) -> tuple[int, ...]:
    """Indices of the layers that are mixtures of experts, ascending."""
    return moe_layers(self.moe.layers, self.num_layers)

  @property
  def depth_layers(self) -> tuple[int, ...]:
    """Indices of the layers that tokens may skip, ascending."""
    return moe_layers(self.depth.layers, self.num_layers)

  @property
  def moe_experts(self) -> tuple[int, ...]:
    """`moe.num_experts` of each mixture, from the first on: the same of all but in a pyramid."""
    if not self.moe.pyramid:
      return (self.moe.num_experts,) * len(self.moe_layers)
    return tuple(int(count) for count in self.moe.pyramid.split(','))


@dataclasses.dataclass(frozen=True)
class AdafactorSettings:
  clip_threshold: Annotated[float, _not_negative]
  parameter_scale: bool
  factor_from: Annotated[int, _at_least_2]


@dataclasses.dataclass(frozen=True)
class OptimSettings:
  name: Literal['adamw', 'adafactor']
  adafactor: AdafactorSettings
  schedule: Literal['cosine', 'trapezoid', 'rsqrt', 'constant']
  learning_rate: Annotated[float, _positive]
  warmup_steps: Annotated[int, _not_negative]
  cooldown_steps: Annotated[int, _not_negative]
  timescale: Annotated[float, _positive]
  final_fraction: Annotated[float, _fraction]
  b1: Annotated[float, _below_one]
  b2: Annotated[float, _below_one]
  eps: Annotated[float, _positive]
  weight_decay: Annotated[float, _not_negative]
  decay_of: dict[str, Annotated[float, _not_negative]]  # by the end of a parameter's path
  clip_norm: Annotated[float, _not_negative]
  bias_rate: Annotated[float, _not_negative]
  average_rate: Annotated[float, _fraction]
  consistency: Annotated[float, _not_negative]


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  data: Annotated[int, _axis]
  fsdp: Annotated[int, _axis]
  expert: Annotated[int, _axis]
  tensor: Annotated[int, _axis]


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  every: Annotated[int, _not_negative]
  batches: Annotated[int, _at_least_1]


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  every: Annotated[int, _not_negative]
  keep: Annotated[int, _at_least_2]


@dataclasses.dataclass(frozen=True)
class LogSettings:
  every: Annotated[int, _at_least_1]
  tensorboard: bool
  report: bool


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything a run depends on, beside the code."""

  seed: Annotated[int, _seed]
  steps: Annotated[int, _step_count]
  batch_size: Annotated[int, _at_least_1]
  microbatches: Annotated[int, _at_least_1]
  allow_leak: bool
  profile: bool
  compiler: dict[str, Any]  # options of XLA for the training step
  data: DataSettings
  model: ModelSettings
  optim: OptimSettings
  mesh: MeshSettings
  eval: EvalSettings
  checkpoint: CheckpointSettings
  log: LogSettings

  @classmethod
  def from_config(cls, config: Any) -> Settings:
    """Settings of a ConfigDict, or of a dict such as config.json holds.

    num_kv_heads, head_dim and moe.d_ff, where 0 stands for "as usual", have their values in the result.

    Raises:
      BadInput: one sentence with the key, its value and what is accepted.
    """
    values = config.to_dict() if hasattr(config, 'to_dict') else config
    if not isinstance(values, Mapping):
      raise BadInput(f'a config must be a ConfigDict or a dict, not a {type(config).__name__}')
    settings = read(cls, with_later(values))
    check_model(settings.model)
    check_together(settings)
    return dataclasses.replace(settings, model=_resolved(settings.model))


def moe_layers(pattern: str, num_layers: int) -> tuple[int, ...]:
  """Layer indices that `pattern` names: every_N is the last of each N layers, last_half rounds down, last_N is N."""
  if pattern == 'none':
    return ()
  if pattern == 'last_half':
    return tuple(range(num_layers - num_layers // 2, num_layers))
  if pattern.startswith('last_'):
    first = num_layers - int(pattern.removeprefix('last_'))
    return tuple(range(first, num_layers))
  if pattern == 'all' or pattern.startswith('every_'):
    every = int(pattern.removeprefix('every_')) if pattern != 'all' else 1
    return tuple(range(every - 1, num_layers, every))
  return tuple(sorted(int(index) for index in pattern.split(',')))


def _resolved(model: ModelSettings) -> ModelSettings:
  return dataclasses.replace(
    model,
    num_kv_heads=model.num_kv_heads or model.num_heads,
    head_dim=model.head_dim or model.d_model // model.num_heads,
    moe=dataclasses.replace(model.moe, d_ff=model.moe.d_ff or model.d_ff),
  )
