"""Attention whose heads, or what is in them, are experts: `model.attention` 'experts' and 'switch_head'."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from experiments.errors import BadInput
from experiments.settings import ModelSettings, Settings
from moejax.mesh.make import BATCH_AXES
from moejax.moe.attention_experts import AttentionExperts
from moejax.moe.head_rows import BesideTokens, by_expert
from moejax.moe.losses import check_losses
from moejax.moe.switch_head import SwitchHead
from moejax.option_types import check_types
from moejax.routers import Flags

OPTIONS = {'experts': ('kind',), 'switch_head': ('k',)}
"""Kind of attention -> its own options, names of `model.heads.options`."""


@dataclasses.dataclass(frozen=True)
class HeadFacts:
  """What is known of such a layer before it exists.

  Attributes:
    flags: what its router promises.
    has_bias: whether it has a bias that loss-free balancing would move.
    active_share: sequence length -> fraction of the experts' parameters that work on a token.
    flops: sequence length -> FLOPs of one token in the layer, by part.
  """

  flags: Flags
  has_bias: bool
  active_share: Callable[[int], float]
  flops: Callable[[int], dict[str, int | float]]


def heads_maker(
  model: ModelSettings, dtype: Any, mesh: Mesh | None = None
) -> Callable[[nnx.Rngs], nnx.Module] | None:
  """Makes the attention of one block, on this mesh or one device; None for models whose heads are not experts."""
  if model.attention not in OPTIONS:
    return None
  heads = model.heads
  common = {
    'causal': model.kind == 'decoder',
    'losses': {},  # the training step makes them of the stats of all microbatches
    'dtype': dtype,
    'out_scale': (2 * model.num_layers) ** -0.5,
    'work': BesideTokens(mesh, BATCH_AXES) if mesh is not None and mesh.size > 1 else by_expert,
    **heads.options,
  }
  sizes = (model.d_model, model.head_dim, heads.num_experts)
  if model.attention == 'experts':
    return lambda rngs: AttentionExperts(*sizes, heads.router, **common, rngs=rngs)
  return lambda rngs: SwitchHead(*sizes, num_heads=model.num_heads, **common, rngs=rngs)


def head_facts(model: ModelSettings) -> HeadFacts | None:
  """Asks the layer itself; no array is made. None for models whose heads are not experts.

  Raises:
    ValueError: an unknown router or option, one out of its range, or a router that does not choose by token.
  """
  make = heads_maker(model, jnp.float32)
  if make is None:
    return None
  layers: list[Any] = []

  def call(key: jax.Array) -> jax.Array:
    layers.append(make(nnx.Rngs(key)))
    return layers[0](jnp.zeros((1, 4, model.d_model)))[0]

  for option in model.heads.options:
    if option not in OPTIONS[model.attention]:
      accepted = ', '.join(OPTIONS[model.attention])
      raise ValueError(f'option {option!r} of {model.attention!r}: accepted are {accepted}')
  kinds = {'experts': AttentionExperts, 'switch_head': SwitchHead}
  check_types(f'{model.attention!r}', kinds[model.attention], model.heads.options)
  if model.attention == 'experts' and not isinstance(model.heads.router.get('name'), str):
    raise ValueError("router without a name: accepted are mappings {'name': ..., **options}")
  jax.eval_shape(call, jax.random.key(0))
  layer = layers[0]
  has_bias = isinstance(layer, AttentionExperts) and layer.router.bias is not None
  return HeadFacts(layer.flags, has_bias, layer.active_share, layer.flops_per_token)


def check_heads(settings: Settings) -> None:
  """Refuses what only the library knows to be wrong with heads that are experts.

  Raises:
    BadInput: one sentence with the key, its value and what is accepted.
  """
  model = settings.model
  try:
    check_losses(model.heads.losses)
    facts = head_facts(model)
  except (ValueError, TypeError) as error:
    raise BadInput(f'model.heads: {error}') from error
  if facts is None:
    return
  router = model.heads.router
  if facts.has_bias or facts.flags.needs or facts.flags.has_state:
    raise BadInput(
      f'model.heads.router={router} has a bias, a state over depth or needs more than the tokens: accepted are routers '
      'without'
    )
  if model.kind == 'decoder' and not facts.flags.prefix_safe and not settings.allow_leak:
    raise BadInput(
      f'model.heads.router={router} lets a token see later ones: accepted are no capacity_factor, '
      "model.kind='encoder', or allow_leak=True"
    )
