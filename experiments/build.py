"""From checked settings to streams, a model and its state: the border between configs and the library."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.data import Stream, make_stream
from experiments.errors import BadInput
from experiments.optim import make_optimizer
from experiments.settings import MoESettings, Settings
from experiments.state import ModelDef, TrainState, make_state
from moejax.mesh.make import AXES, make_mesh
from moejax.moe.dispatch import DISPATCHES
from moejax.moe.exchange import AllGather, Exchange, Local, single
from moejax.moe.layer import MoE
from moejax.moe.losses import check_losses
from moejax.routers import Flags
from moejax.transformer import Decoder, Encoder, ViT
from moejax.transformer.flops import (
  forward_flops_per_image,
  forward_flops_per_token,
  moe_flops_per_token,
)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What every program needs of an experiment.

  Attributes:
    mesh: over all devices.
    train_stream, eval_stream: data.
    definition: the model.
    init: computes the initial state, on its shards.
    abstract: what a state looks like, with shardings, to restore into.
    optimizer: of optax.
  """

  mesh: Mesh
  train_stream: Stream
  eval_stream: Stream
  definition: ModelDef
  init: Callable[[], TrainState]
  abstract: TrainState
  optimizer: optax.GradientTransformation


def assemble(settings: Settings) -> Experiment:
  """Opens the data and lays the model out on the mesh; computes nothing yet.

  Raises:
    BadInput: settings that only the data, the devices or the library can refuse.
  """
  check_routing(settings)
  mesh = build_mesh(settings)
  train_stream, eval_stream = open_stream(settings, train=True), open_stream(settings, train=False)
  try:
    definition = ModelDef(model_maker(settings, train_stream, mesh))
    init, abstract, optimizer = make_state(
      definition,
      functools.partial(make_optimizer, settings.optim, settings.steps),
      mesh,
      jax.random.key(settings.seed),
    )
  except ValueError as error:
    raise BadInput(str(error)) from error
  return Experiment(mesh, train_stream, eval_stream, definition, init, abstract, optimizer)


def open_stream(settings: Settings, *, train: bool) -> Stream:
  """The training stream, or the evaluation stream of the same data."""
  data = settings.data
  return make_stream(
    data.name,
    split=data.split if train else data.eval_split,
    objective=data.objective,
    batch_size=settings.batch_size,
    seed=settings.seed,
    sequence_length=data.sequence_length,
    tokenizer=data.tokenizer,
    mask_rate=data.mask_rate,
    data_dir=data.data_dir or None,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    train=train,
    image_size=data.image_size or None,
    normalization=data.normalization,
  )


def build_mesh(settings: Settings) -> Mesh:
  """The mesh over all devices.

  Raises:
    BadInput: axes that do not fit the devices, or a batch that does not divide over them.
  """
  try:
    mesh = make_mesh(**vars(settings.mesh), devices=jax.devices())
  except ValueError as error:
    raise BadInput(str(error)) from error
  microbatch = settings.batch_size // settings.microbatches
  if microbatch % mesh.size:
    raise BadInput(
      f'batch_size={settings.batch_size} in microbatches={settings.microbatches} of {microbatch} does not divide '
      f'over the {mesh.size} devices of the mesh'
    )
  return mesh


def check_routing(settings: Settings) -> None:
  """Refuses what only the library knows to be wrong, before anything is computed.

  Raises:
    BadInput: an unknown router, router option or loss, an option out of its range, or a router that looks at
      later tokens in a causal model.
  """
  if not settings.model.moe_layers:
    return
  moe = settings.model.moe
  try:
    check_losses(moe.losses)
    flags = router_flags(moe)
  except (ValueError, TypeError) as error:
    raise BadInput(f'model.moe: {error}') from error
  if settings.optim.bias_rate and not moe.router.get('balance_bias'):
    raise BadInput(
      f'optim.bias_rate={settings.optim.bias_rate} with router {moe.router["name"]!r} without a bias to move: '
      "accepted are model.moe.router={'name': 'top_k', 'balance_bias': True, ...}, or 0"
    )
  if settings.model.kind == 'decoder' and not flags.prefix_safe and not settings.allow_leak:
    safe = {
      'expert_choice': "model.moe.router.group='position'",
      'soft': "model.moe.router.name='top_k'",
    }.get(moe.router['name'], "model.moe.router.priority='token_major', or no capacity_factor")
    raise BadInput(
      f"model.moe.router={moe.router} lets a token see later ones, so a model of kind 'decoder' would train on what "
      f'it has to predict: accepted are {safe}, or allow_leak=True'
    )


def router_flags(moe: MoESettings) -> Flags:
  """What the layer's router promises; no array is made.

  Raises:
    ValueError: an unknown router or option, or one out of its range.
  """
  flags = []

  def make(key: jax.Array) -> None:
    sizes = (1, moe.d_ff, moe.num_experts)
    layer = MoE(*sizes, moe.router, granularity=moe.granularity, gated=False, rngs=nnx.Rngs(key))
    flags.append(layer.router.flags)

  jax.eval_shape(make, jax.random.key(0))
  return flags[0]


def make_exchange(settings: Settings, mesh: Mesh) -> Exchange:
  """'auto': nothing on one device, `Local` where experts are replicated and rows stay put, else `AllGather`."""
  name = settings.model.moe.exchange
  if mesh.size == 1:
    return single
  local = mesh.shape['expert'] == 1 and router_flags(settings.model.moe).stays_in_sequence
  if name == 'local' and not local:
    raise BadInput(
      f"model.moe.exchange='local' with mesh axis expert={mesh.shape['expert']} and router "
      f"{settings.model.moe.router['name']!r}: accepted is 'all_gather'"
    )
  return Local(mesh, AXES) if local and name != 'all_gather' else AllGather(mesh, AXES)


def compute_dtype(settings: Settings, mesh: Mesh) -> Any:
  """'auto' is float32 on CPU and bfloat16 on accelerators."""
  if settings.model.dtype != 'auto':
    return jnp.dtype(settings.model.dtype)
  return jnp.float32 if mesh.devices.flat[0].platform == 'cpu' else jnp.bfloat16


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
    'moe': _moe_maker(settings, mesh, dtype),
    'moe_layers': model.moe_layers,
    'remat': model.remat,
    'unroll': model.unroll,
    'dtype': dtype,
  }
  if model.kind == 'vit':
    sizes = (stream.image_shape, model.patch_size, stream.num_classes)
    return lambda rngs: ViT(*sizes, **shared, rngs=rngs)
  shared |= {
    'num_kv_heads': model.num_kv_heads,
    'head_dim': model.head_dim,
    'tie_embeddings': model.tie_embeddings,
    'gated': model.gated,
  }
  kind = Decoder if model.kind == 'decoder' else Encoder
  return lambda rngs: kind(stream.vocab_size, **shared, rngs=rngs)


def _moe_maker(settings: Settings, mesh: Mesh, dtype):
  if not settings.model.moe_layers:
    return None
  model, moe = settings.model, settings.model.moe
  exchange = make_exchange(settings, mesh)
  return lambda rngs: MoE(
    model.d_model,
    moe.d_ff,
    moe.num_experts,
    moe.router,
    granularity=moe.granularity,
    num_shared=moe.num_shared,
    activation=model.activation,
    gated=model.gated,
    losses={},  # the training step makes them of the stats of all microbatches
    dispatch=DISPATCHES[moe.dispatch],
    exchange=exchange,
    output_norm=moe.output_norm,
    out_scale=(2 * model.num_layers) ** -0.5,
    dtype=dtype,
    rngs=rngs,
  )


def training_flops(settings: Settings, stream: Stream) -> float:
  """Model FLOPs of one training step: three times the forward pass, recomputation not counted."""
  model = settings.model
  sizes: dict[str, Any] = {
    'd_model': model.d_model,
    'num_layers': model.num_layers,
    'num_heads': model.num_heads,
    'd_ff': model.d_ff,
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
  parts = forward_flops_per_token(
    vocab_size=stream.vocab_size,
    seq_len=settings.data.sequence_length,
    num_kv_heads=model.num_kv_heads,
    head_dim=model.head_dim,
    gated=model.gated,
    **sizes,
  )
  return 3 * settings.batch_size * settings.data.sequence_length * sum(parts.values())


def _moe_flops(settings: Settings, stream: Stream) -> dict[str, float]:
  model, moe = settings.model, settings.model.moe
  return moe_flops_per_token(
    d_model=model.d_model,
    d_ff=moe.d_ff // moe.granularity,
    num_experts=moe.num_experts * moe.granularity,
    experts_per_token=experts_per_token(settings, stream),
    num_shared=moe.num_shared,
    gated=model.gated,
  )


def experts_per_token(settings: Settings, stream: Stream) -> float:
  """Mean number of routed experts that work on a token, before any drop."""
  moe = settings.model.moe
  name, options = moe.router['name'], moe.router
  num_experts = moe.num_experts * moe.granularity
  if name == 'dense':
    return num_experts
  if name == 'soft':
    height, width, _ = stream.image_shape or (settings.data.sequence_length, 1, 1)
    patch = settings.model.patch_size if stream.image_shape else 1
    return num_experts * options.get('slots', 1) / ((height // patch) * (width // patch))
  if name == 'expert_choice':
    default = 2.0 if moe.granularity == 1 else 1.0
    return options.get('capacity_factor', default) * moe.granularity
  if name in ('switch', 'gshard'):
    return {'switch': 1, 'gshard': 2}[name]
  return options.get('k', 2 if moe.granularity == 1 else 1) * moe.granularity
