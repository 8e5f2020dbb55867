"""From checked settings to streams, a model and its state: the border between configs and the library."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from experiments.data import Stream, make_stream
from experiments.errors import BadInput
from experiments.heads import check_heads, head_facts, heads_maker
from experiments.optim import make_optimizer
from experiments.place import batch_share
from experiments.program import Program
from experiments.settings import ModelSettings, Settings
from experiments.state import ModelDef
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.dispatch import DISPATCHES
from moejax.moe.exchange import Exchange, single
from moejax.moe.exchange import make_exchange as exchange_by_name
from moejax.moe.kinds import make_layer
from moejax.moe.losses import check_losses
from moejax.routers import SHARED, Flags, make_shared
from moejax.scaling.ours import latent_of
from moejax.transformer import Decoder, Depth, Encoder, ViT
from moejax.transformer.flops import (
  forward_flops_per_image,
  forward_flops_per_token,
)

# What a compiled program does not depend on: it is an argument (experiments.step.Control), or of the host.
RUN_SETTINGS = (
  'seed',
  'steps',
  'profile',
  'allow_leak',
  'optim.schedule',
  'optim.learning_rate',
  'optim.warmup_steps',
  'optim.cooldown_steps',
  'optim.timescale',
  'optim.final_fraction',
  'data',
  'eval',
  'checkpoint',
  'log',
)


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What every program needs of an experiment.

  Attributes:
    train_stream, eval_stream: data.
    program: the model and what is compiled of it.
  """

  train_stream: Stream
  eval_stream: Stream
  program: Program


def assemble(settings: Settings, programs: dict[str, Program] | None = None) -> Experiment:
  """Opens the data and lays the model out on the mesh; computes nothing yet.

  Args:
    settings: of the run.
    programs: those of earlier runs in this process, which a run of the same shape takes over, compiled; a new one is
      added.

  Raises:
    BadInput: settings that only the data, the devices or the library can refuse.
  """
  check_routing(settings)
  share = batch_share(build_mesh(settings))
  train_stream = open_stream(settings, train=True, share=share)
  eval_stream = open_stream(settings, train=False, share=share)
  if train_stream.num_labels and settings.model.output == 'softmax':
    raise BadInput(
      f"model.output='softmax' with images of up to {train_stream.num_labels} labels "
      f"(data.name={settings.data.name!r}): it must be 'sigmoid'"
    )
  programs = {} if programs is None else programs
  key = program_key(settings, train_stream)
  if key not in programs:
    programs[key] = build_program(settings, train_stream)
  return Experiment(train_stream, eval_stream, programs[key])


def build_program(settings: Settings, stream: Stream) -> Program:
  """The program of these settings on all devices; nothing is compiled yet.

  Raises:
    BadInput: what only the devices or the library can refuse.
  """
  mesh = build_mesh(settings)
  try:
    return Program(
      ModelDef(model_maker(settings, stream, mesh)),
      functools.partial(make_optimizer, settings.optim),
      mesh,
      microbatches=settings.microbatches,
      losses=settings.model.moe.losses,
      other_losses={
        'attention': settings.model.heads.losses,
        'depth': {'guidance': settings.model.depth.loss},
      },
      bias_rate=settings.optim.bias_rate,
      average_rate=settings.optim.average_rate,
      consistency=settings.optim.consistency,
      output=settings.model.output,
    )
  except ValueError as error:
    raise BadInput(str(error)) from error


def program_key(settings: Settings, stream: Stream) -> str:
  """Equal for runs that can share a program: all settings but those of `RUN_SETTINGS`, and the shape of the data."""
  values = dataclasses.asdict(settings)
  for name in RUN_SETTINGS:
    section, _, key = name.rpartition('.')
    del (values[section] if section else values)[key]
  shape = (stream.vocab_size, stream.image_shape, stream.num_classes, stream.num_labels)
  return json.dumps([values, shape], sort_keys=True)


def open_stream(settings: Settings, *, train: bool, share: tuple[int, int] = (0, 1)) -> Stream:
  """The training stream, or the evaluation stream of the same data; of each batch this `batch_share`."""
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
    process_index=share[0],
    process_count=share[1],
    train=train,
    image_size=data.image_size or None,
    normalization=data.normalization,
    augment=data.augment,
    eval_crop=data.eval_crop,
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
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  if microbatch % shards:
    raise BadInput(
      f'batch_size={settings.batch_size} in microbatches={settings.microbatches} of {microbatch} does not divide '
      f'over the {shards} devices of the mesh'
      + ('' if shards == mesh.size else f' axes {", ".join(BATCH_AXES)}')
    )
  return mesh


def check_routing(settings: Settings) -> None:
  """Refuses what only the library knows to be wrong, before anything is computed.

  Raises:
    BadInput: an unknown router, router option or loss, an option out of its range, or a router that looks at
      later tokens in a causal model.
  """
  check_heads(settings)
  _check_depth(settings)
  if not settings.model.moe_layers:
    return
  moe = settings.model.moe
  try:
    check_losses(moe.losses)
    facts = router_facts(settings.model)
  except (ValueError, TypeError) as error:
    raise BadInput(f'model.moe: {error}') from error
  if moe.pyramid and (moe.router['name'] in SHARED or facts.flags.has_state or moe.momentum):
    raise BadInput(
      f'model.moe.pyramid={moe.pyramid} with router {moe.router["name"]!r}: accepted are routers without a state over '
      'depth, and no momentum'
    )
  if settings.optim.bias_rate and not facts.has_bias:
    raise BadInput(
      f'optim.bias_rate={settings.optim.bias_rate} with router {moe.router["name"]!r} without a bias to move: '
      "accepted are model.moe.router={'name': 'top_k', 'balance_bias': True, ...}, or 0"
    )
  _check_group_size(settings)
  _check_needs(settings, facts.flags.needs)
  if settings.model.kind == 'decoder' and not facts.flags.prefix_safe and not settings.allow_leak:
    name = moe.router['name']
    safe = "model.moe.router.name='top_k'"
    if moe.kind == 'nested':
      raise BadInput(
        f"model.moe.kind={moe.kind!r} lets a token see later ones: accepted are other kinds, model.kind='encoder' or "
        "'vit', or allow_leak=True"
      )
    if name in ('expert_choice', 'sinkhorn_expert_choice'):
      safe = "model.moe.router.group='position'"
    elif name in ('top_k', 'gshard', 'vmoe'):
      safe = "model.moe.router.priority='token_major', or no capacity_factor"
    raise BadInput(
      f"model.moe.router={moe.router} lets a token see later ones, so a model of kind 'decoder' would train on what "
      f'it has to predict: accepted are {safe}, or allow_leak=True'
    )


def _check_depth(settings: Settings) -> None:
  """Refuses blocks that tokens skip where the choice would look ahead, or lose a state."""
  model = settings.model
  if not model.depth_layers:
    return
  if model.kind == 'decoder' and not settings.allow_leak:
    raise BadInput(
      f'model.depth.layers={model.depth.layers!r} lets later tokens decide in training who skips a block: '
      "accepted are 'none', model.kind='encoder', or allow_leak=True"
    )
  moe = model.moe
  if model.moe_layers and (
    moe.router.get('name') in SHARED or moe.momentum or router_facts(model).flags.has_state
  ):
    raise BadInput(
      f'model.depth.layers={model.depth.layers!r} with router {moe.router["name"]!r}: accepted are routers without a '
      'state over depth, and no momentum'
    )


def _check_needs(settings: Settings, needs: tuple[str, ...]) -> None:
  """Refuses a router that asks for what neither the model nor the data can tell."""
  moe, kind = settings.model.moe, settings.model.kind
  for field in set(needs) - {'shared'}:
    if field != 'token_ids':
      raise BadInput(
        f'model.moe.router={moe.router} needs {field}, which data.name={settings.data.name!r} has none of: accepted '
        f'are routers that need none, or a program of your own that passes side={{{field!r}: ...}} to the model'
      )
    if kind == 'vit':
      raise BadInput(
        f'model.moe.router={moe.router} needs token ids, which a model of kind {kind!r} has none of: '
        "accepted are model.kind='decoder', 'encoder'"
      )


def _check_group_size(settings: Settings) -> None:
  size = settings.model.moe.router.get('group_size')
  microbatch = settings.batch_size // settings.microbatches
  if size and microbatch % size:
    raise BadInput(
      f'model.moe.router.group_size={size} does not divide the {microbatch} sequences of a microbatch '
      '(batch_size / microbatches)'
    )


@dataclasses.dataclass(frozen=True)
class RouterFacts:
  """What is known of a mixture and its router before they exist.

  Attributes:
    flags: what it promises.
    has_bias: whether it has a bias that loss-free balancing moves.
    rows_per_token: sequence length -> mean number of experts (or slots) that work on a token.
    active_share: sequence length -> fraction of the experts' parameters that work on a token.
    flops: sequence length -> FLOPs of one token in the layer, by part.
  """

  flags: Flags
  has_bias: bool
  rows_per_token: Callable[[int], float]
  active_share: Callable[[int], float]
  flops: Callable[[int], dict[str, int | float]]


def router_facts(model: ModelSettings) -> RouterFacts:
  """Asks the layer itself; no array is made.

  Raises:
    ValueError: an unknown kind, router or option, or one out of its range.
  """
  layers: dict[int, Any] = {}

  def make(key: jax.Array) -> None:
    for count in set(model.moe_experts):
      layers[count] = _layer(model, count, rngs=nnx.Rngs(key))

  jax.eval_shape(make, jax.random.key(0))
  layer = layers[model.moe.num_experts]
  router = getattr(layer, 'router', None)
  has_bias = router is not None and router.bias is not None
  asked = ('rows_per_token', 'active_share', 'flops_per_token')
  if len(layers) == 1:
    return RouterFacts(layer.flags, has_bias, *(getattr(layer, name) for name in asked))
  return RouterFacts(layer.flags, has_bias, *_means([layers[count] for count in model.moe_experts]))


def _means(layers: list[Any]) -> tuple[Callable[[int], Any], ...]:
  """Rows, active share and FLOPs of a token, means over the layers of a pyramid; of shares over experts."""
  count = len(layers)

  def rows(length: int) -> float:
    return sum(layer.rows_per_token(length) for layer in layers) / count

  def share(length: int) -> float:
    experts = [layer.num_experts for layer in layers]
    active = [layer.active_share(length) for layer in layers]
    return sum(map(operator.mul, active, experts)) / sum(experts)

  def flops(length: int) -> dict[str, int | float]:
    found = [layer.flops_per_token(length) for layer in layers]
    return {part: sum(one[part] for one in found) / count for part in found[0]}

  return rows, share, flops


def _layer(model: ModelSettings, num_experts: int, *, rngs: nnx.Rngs, **options: Any) -> Any:
  moe = model.moe
  return make_layer(
    moe.kind,
    model.d_model,
    moe.d_ff,
    num_experts,
    moe.router,
    options=moe.options,
    granularity=moe.granularity,
    num_shared=moe.num_shared,
    shared_mix=moe.shared_mix,
    zero_experts=moe.zero_experts,
    zero_cost=moe.zero_cost,
    activation=model.activation,
    gated=model.gated,
    losses={},  # the training step makes them of the stats of all microbatches
    output_norm=moe.output_norm,
    momentum=moe.momentum or None,
    out_scale=(2 * model.num_layers) ** -0.5,
    rngs=rngs,
    **options,
  )


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
  if mesh.size == 1:
    return single
  name = exchange_name(settings, mesh.shape['expert'])
  try:
    return exchange_by_name(name, mesh, BATCH_AXES, moe.exchange_options)
  except (TypeError, ValueError) as error:
    raise BadInput(f'model.moe: {error}') from error


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
    'moe_shared': _shared_maker(model),
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
    'heads': heads_maker(model, dtype),
    'depth': depth_of(model),
    'positions': model.positions,
    'rope_theta': model.rope_theta,
    'head_dim': model.head_dim,
    'tie_embeddings': model.tie_embeddings,
    'gated': model.gated,
  }
  kind = Decoder if model.kind == 'decoder' else Encoder
  rows = vocab_size(settings, stream)
  return lambda rngs: kind(rows, **shared, rngs=rngs)


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


def _moe_maker(settings: Settings, mesh: Mesh, dtype):
  if not settings.model.moe_layers:
    return None
  model, moe = settings.model, settings.model.moe
  exchange = make_exchange(settings, mesh)
  dispatch = DISPATCHES[moe.dispatch]
  options = {'dispatch': dispatch, 'exchange': exchange, 'dtype': dtype}
  makers = {
    count: functools.partial(_make_mixture, model, count, options) for count in model.moe_experts
  }
  if len(makers) == 1:
    return makers[model.moe.num_experts]
  return tuple(makers[count] for count in model.moe_experts)


def _make_mixture(model: ModelSettings, num_experts: int, options: dict[str, Any], rngs: nnx.Rngs):
  return _layer(model, num_experts, **options, rngs=rngs)


def _shared_maker(model: ModelSettings) -> Callable[[nnx.Rngs], nnx.Module] | None:
  """What the routers of all layers share, if they do (`moejax.transformer.Stack`)."""
  moe = model.moe
  options = {key: value for key, value in moe.router.items() if key != 'name'}
  sizes = {
    'd_model': model.d_model,
    'num_experts': moe.num_experts * moe.granularity + sum(moe.zero_experts.values()),
  }

  def make(rngs: nnx.Rngs) -> nnx.Module | None:
    return make_shared(moe.router['name'], **sizes, **options, rngs=rngs)

  if not model.moe_layers or moe.router['name'] not in SHARED:
    return None
  return make


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
      gated=model.gated,
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
