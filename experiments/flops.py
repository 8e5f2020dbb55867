"""What a run costs by count: FLOPs, and the share of parameters that work on a token."""

from __future__ import annotations

import math
from typing import Any

from experiments.data import Stream
from experiments.heads import head_facts
from experiments.make_model import vocab_size
from experiments.mixtures import router_facts
from experiments.settings import Settings
from moejax.scaling.ours import latent_of
from moejax.transformer import Depth
from moejax.transformer.flops import (
  forward_flops_per_image,
  forward_flops_per_token,
)


def training_flops(settings: Settings, stream: Stream) -> float:
  """Model FLOPs of one training step: three times the forward pass, recomputation not counted."""
  model = settings.model
  sizes: dict[str, Any] = {
    'd_model': model.d_model,
    'num_layers': model.num_layers,
    'num_heads': model.num_heads,
    'd_ff': model.d_ff,
    'gated': model.gated,
    'num_moe_layers': len(model.moe_layers),
    'moe': _moe_flops(settings, stream) if model.moe_layers else None,
  }
  if model.kind == 'vit':
    parts = forward_flops_per_image(
      image_shape=stream.image_shape,
      patch_size=model.patch_size,
      num_classes=stream.num_classes,
      **sizes,
    )
    return 3 * settings.batch_size * sum(parts.values())
  length, skipped = settings.data.sequence_length, set(model.depth_layers)
  heads = head_facts(model)

  def flops(tokens: int, layers: set[int], rows: int) -> float:
    """Of so many tokens of a sequence in these layers, and the head with so many rows."""
    own = {
      'num_layers': len(layers),
      'num_moe_layers': len(layers.intersection(model.moe_layers)),
      'heads': None if heads is None else heads.flops(tokens),
    }
    parts = forward_flops_per_token(
      vocab_size=rows,
      seq_len=tokens,
      num_kv_heads=model.num_kv_heads,
      head_dim=model.head_dim,
      latent=latent_of(model),
      **(sizes | own),
    )
    return tokens * sum(parts.values())

  total = flops(length, set(range(model.num_layers)) - skipped, vocab_size(settings, stream))
  if skipped:
    depth = Depth(model.depth_layers, model.depth.capacity, model.depth.decide)
    total += flops(math.ceil(model.depth.capacity * length - 1e-9), skipped, 0)
    total += length * len(skipped) * depth.flops_per_token(model.d_model)
  return 3 * settings.batch_size * total


def _moe_flops(settings: Settings, stream: Stream) -> dict[str, int | float]:
  return router_facts(settings.model).flops(sequence_length(settings, stream))


def experts_per_token(settings: Settings, stream: Stream) -> float:
  """Mean number of routed experts that work on a token, before any drop."""
  return router_facts(settings.model).rows_per_token(sequence_length(settings, stream))


def active_share(settings: Settings, stream: Stream) -> float:
  """Fraction of the experts' parameters that work on a token, before any drop."""
  return router_facts(settings.model).active_share(sequence_length(settings, stream))


def sequence_length(settings: Settings, stream: Stream) -> int:
  """Tokens, or patches of an image, in a sequence."""
  if stream.image_shape is None:
    return settings.data.sequence_length
  height, width, _ = stream.image_shape
  return (height // settings.model.patch_size) * (width // settings.model.patch_size)
