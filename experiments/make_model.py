"""A model, its mesh and its exchange from settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from experiments.data import Stream
from experiments.errors import BadInput
from experiments.heads import heads_maker
from experiments.mixtures import make_mixture, router_facts, shared_maker
from experiments.settings import ModelSettings, Settings
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.dispatch import make_dispatch
from moejax.moe.exchange import Exchange, check_exchange, single
from moejax.moe.exchange import make_exchange as exchange_by_name
from moejax.scaling.ours import latent_of
from moejax.transformer import Decoder, Depth, Encoder, ViT


def build_mesh(settings: Settings) -> Mesh:
  """The mesh over all devices.

  Raises:
    BadInput: axes that do not fit the devices, or a batch that does not divide over them.
  """
  devices = jax.devices()
  try:
    mesh = make_mesh(**vars(settings.mesh), devices=devices)
  except ValueError as error:
    how = ': XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment emulates 8'
    raise BadInput(f'{error}{how if devices[0].platform == "cpu" else ""}') from error
  microbatch = settings.batch_size // settings.microbatches
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if microbatch % shards:
    raise BadInput(
      f'batch_size={settings.batch_size} in microbatches={settings.microbatches} of {microbatch} does not divide '
      f'over the {shards} devices of the mesh'
      + ('' if shards == mesh.size else f' axes {", ".join(BATCH_AXES)}')
    )
  return mesh


def exchange_name(settings: Settings, expert: int) -> str:
  """The exchange on a mesh whose experts are cut over so many devices.

  'auto' is 'local' where experts are replicated and rows stay put, else 'all_gather'.

  Raises:
    BadInput: 'local' for routers whose rows do not stay put.
  """
  moe = settings.model.moe
  stays = router_facts(settings.model).flags.stays_in_sequence
  if moe.exchange == 'local' and not stays:
    raise BadInput(
      f"model.moe.exchange='local' with router {moe.router['name']!r}, whose rows leave their sequence: "
      "accepted is 'all_gather'"
    )
  if moe.exchange == 'auto':
    return 'local' if expert == 1 and stays else 'all_gather'
  return moe.exchange


def make_exchange(settings: Settings, mesh: Mesh) -> Exchange:
  """The exchange of the settings; nothing on one device.

  Raises:
    BadInput: an option that the exchange does not take, or what `exchange_name` refuses.
  """
  moe = settings.model.moe
  alone = mesh.size == 1  # any exchange is none; 'auto' takes no options anywhere
  name = moe.exchange if alone else exchange_name(settings, mesh.shape['expert'])
  try:
    if alone:
      check_exchange('local' if name == 'auto' else name, moe.exchange_options)
      return single
    return exchange_by_name(name, mesh, BATCH_AXES, moe.exchange_options)
  except (TypeError, ValueError) as error:
    raise BadInput(f'model.moe: {error}') from error


def compute_dtype(settings: Settings, mesh: Mesh) -> Any:
  """'auto' is float32 on CPU and bfloat16 on accelerators."""
  if settings.model.dtype != 'auto':
    return jnp.dtype(settings.model.dtype)
  return jnp.float32 if _on_cpu(mesh) else jnp.bfloat16


def _on_cpu(mesh: Mesh) -> bool:
  return bool(mesh.devices.flat[0].platform == 'cpu')


def model_maker(settings: Settings, stream: Stream, mesh: Mesh) -> Callable[[nnx.Rngs], nnx.Module]:
  """`make(rngs)`: the model of these settings for the stream's vocabulary or images."""
  model = settings.model
  dtype = compute_dtype(settings, mesh)
  shared = {
    'd_model': model.d_model,
    'num_layers': model.num_layers,
    'num_heads': model.num_heads,
    'd_ff': model.d_ff,
    'qk_norm': model.qk_norm,
    'activation': model.activation,
    'gated': model.gated,
    'moe': _moe_maker(settings, mesh, dtype),
    'moe_layers': model.moe_layers,
    'moe_shared': shared_maker(model),
    'remat': model.remat,
    'unroll': model.unroll,
    'dtype': dtype,
  }
  if model.kind == 'vit':
    sizes = (stream.image_shape, model.patch_size, stream.num_classes)
    return lambda rngs: ViT(*sizes, **shared, head_bias=model.head_bias, rngs=rngs)
  shared |= {
    'num_kv_heads': model.num_kv_heads,
    'qk_norm_scope': model.qk_norm_scope,
    'latent': latent_of(model),
    'heads': heads_maker(model, dtype, mesh),
    'depth': depth_of(model),
    'positions': model.positions,
    'rope_theta': model.rope_theta,
    'head_dim': model.head_dim,
    'tie_embeddings': model.tie_embeddings,
  }
  if _on_cpu(mesh) and model.kind == 'decoder' and model.attention == 'grouped':
    shared['attention'] = 'pieces'  # not measured elsewhere
  kind = Decoder if model.kind == 'decoder' else Encoder
  rows = vocab_size(settings, stream)
  return lambda rngs: kind(rows, **shared, rngs=rngs)


def _moe_maker(settings: Settings, mesh: Mesh, dtype):
  if not settings.model.moe_layers:
    return None
  model, moe = settings.model, settings.model.moe
  exchange = make_exchange(settings, mesh)
  named = None if moe.implementation == 'auto' else moe.implementation
  dispatch = make_dispatch(moe.dispatch, named)
  options = {'dispatch': dispatch, 'exchange': exchange, 'dtype': dtype}
  makers = {
    count: functools.partial(make_mixture, model, count, options) for count in model.moe_experts
  }
  if len(makers) == 1:
    return makers[model.moe.num_experts]
  return tuple(makers[count] for count in model.moe_experts)


def vocab_size(settings: Settings, stream: Stream) -> int:
  """Rows of the embedding: those of the tokenizer, or more where the settings say so.

  Raises:
    BadInput: fewer than the tokenizer has.
  """
  rows = settings.model.vocab_size
  if rows and rows < stream.vocab_size:
    raise BadInput(
      f'model.vocab_size={rows} is less than the {stream.vocab_size} tokens of data.tokenizer='
      f'{settings.data.tokenizer!r}: accepted are 0, as many as these, or more'
    )
  return rows or stream.vocab_size


def depth_of(model: ModelSettings) -> Depth | None:
  """Which blocks tokens may skip, and how; None where they skip none."""
  if not model.depth_layers:
    return None
  return Depth(model.depth_layers, model.depth.capacity, model.depth.decide)
