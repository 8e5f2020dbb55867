"""A training step as numbers: what the analytic model knows of a config."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.check_routing import check_routing
from experiments.errors import BadInput
from experiments.flops import experts_per_token as choices_of
from experiments.flops import training_flops
from experiments.heads import head_facts
from experiments.make_model import vocab_size
from experiments.planning.tensors import Tensor, by_sharding, data_shape, tensors
from experiments.settings import MoESettings, Settings
from moejax.mesh.make import BATCH_AXES
from moejax.scaling.ours import latent_of
from pallas_kernels import registry

EXCHANGES = tuple(
  name for name in typing.get_args(typing.get_type_hints(MoESettings)['exchange']) if name != 'auto'
)
"""Exchanges that the settings take, all of which the analytic model knows."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way to lay a step out.

  Attributes:
    sizes: mesh axis -> devices along it, in the order of the mesh.
    exchange: a name in `EXCHANGES`.
    microbatches: parts of the batch.
    options: of the exchange, beside those of the config where it names the same.
  """

  sizes: Mapping[str, int]
  exchange: str
  microbatches: int
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def batch_shards(self) -> int:
    shards = 1
    for axis in BATCH_AXES:
      shards *= self.sizes.get(axis, 1)
    return shards

  @property
  def expert(self) -> int:
    return self.sizes.get('expert', 1)

  @property
  def tensor(self) -> int:
    return self.sizes.get('tensor', 1)


@dataclasses.dataclass(frozen=True)
class Workload:
  """What does not hang on the layout.

  Attributes:
    settings: of the run.
    tensors: the parameters.
    classes: (one parameter, elements of all) by sharding.
    vocab_size, choices: V, and the mean number of routed experts of a token.
    flops: model FLOPs of a step: three times the forward pass.
    expert_flops: those of them that routed experts take.
    width: bytes of a number of the computation.
    score_width: H of queries and keys together with H of values.
    query_heads: N of a token: of heads that are experts those that it chose.
    head_rows: rows of a token in either projection of heads that are experts; 0 of others.
    blocks: whether routed experts run as padded blocks, which work on rows that were dropped too.
    shares: of each layer, the part of a sequence's tokens that it works on.
  """

  settings: Settings
  tensors: Sequence[Tensor]
  classes: Sequence[tuple[Tensor, int]]
  vocab_size: int
  choices: float
  flops: float
  expert_flops: float
  width: int
  score_width: int
  query_heads: float
  head_rows: float
  blocks: bool
  shares: Sequence[float]

  @property
  def mixtures(self) -> list[tuple[float, int]]:
    """(part of the tokens, number of experts) of each mixture."""
    model = self.settings.model
    counts = [count * model.moe.granularity for count in model.moe_experts]
    return list(zip([self.shares[layer] for layer in model.moe_layers], counts, strict=True))

  @property
  def mixed(self) -> float:
    """In how many mixtures a token is, on average."""
    return sum(share for share, _ in self.mixtures)

  def tokens(self, layout: Layout) -> int:
    """Tokens of a microbatch that a device holds."""
    model = self.settings
    return (
      model.batch_size // layout.microbatches // layout.batch_shards * model.data.sequence_length
    )

  def sums_table(self, layout: Layout) -> bool:
    """Whether the embedding's gradient is summed as a whole table on every device.

    The TPU compiler chooses what takes less memory: with fewer tokens in a microbatch than rows in the table it gathers
    the tokens' gradients instead, on every device, which adds them to its shard of the table.
    """
    return self.tokens(layout) * layout.batch_shards > self.vocab_size


def workload(settings: Settings, platform: str, *, kernels: bool = False) -> Workload:
  """The numbers of these settings.

  Args:
    settings: of a language model.
    platform: 'tpu' or 'gpu', which decides how routed experts run.
    kernels: suppose kernels that skip padding and the rows of other devices, whatever the platform has.

  Raises:
    BadInput: what `check_routing` refuses, images, or data of which nothing is known.
  """
  check_routing(settings)
  model = settings.model
  if model.kind == 'vit':
    raise BadInput("model.kind='vit' is not planned for: accepted are 'decoder' and 'encoder'")
  stream = data_shape(settings)
  found = tensors(settings)
  latent = latent_of(model)
  value = (latent.value_dim or model.head_dim) if latent else model.head_dim
  choices = choices_of(settings, stream) if model.moe_layers else 0.0
  tokens = settings.batch_size * settings.data.sequence_length
  matrices = 3 if model.gated else 2
  d_ff = model.moe.d_ff // model.moe.granularity
  heads, head_rows = heads_of(settings)
  shares = shares_of(settings)
  mixed = sum(shares[layer] for layer in model.moe_layers)
  expert_flops = 3 * tokens * mixed * choices * matrices * 2 * model.d_model * d_ff
  return Workload(
    settings=settings,
    tensors=found,
    classes=by_sharding(found),
    vocab_size=vocab_size(settings, stream),
    choices=choices,
    flops=training_flops(settings, stream),
    expert_flops=expert_flops,
    width=4 if model.dtype == 'float32' else 2,
    score_width=model.head_dim + (latent.rotary_dim if latent else 0) + value,
    query_heads=heads,
    head_rows=head_rows,
    blocks=not kernels and registry.BY_PLATFORM.get(platform, registry.DEFAULT) == 'blocks',
    shares=shares,
  )


def heads_of(settings: Settings) -> tuple[float, float]:
  """Query heads of a token, and its rows in either projection of heads that are experts: by the FLOPs of the layer."""
  model, length = settings.model, settings.data.sequence_length
  facts = head_facts(model)
  if facts is None:
    return model.num_heads, 0.0
  flops = facts.flops(length)
  heads = flops['attention_scores'] / (4 * length * model.head_dim)
  ordinary = 1 if model.attention == 'experts' else heads  # keys, with values or with queries
  return heads, flops['attention_projections'] / (4 * model.d_model * model.head_dim) - ordinary


def shares_of(settings: Settings) -> tuple[float, ...]:
  """Of each layer, the part of a sequence's tokens that go through it in training, rounded up to whole ones."""
  model, length = settings.model, settings.data.sequence_length
  through = math.ceil(model.depth.capacity * length - 1e-9) / length
  return tuple(through if i in model.depth_layers else 1.0 for i in range(model.num_layers))
