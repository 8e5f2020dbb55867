"""Rules that tie an experiment's settings together; those of one setting stand beside it in settings.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.errors import BadInput
from experiments.schema import refuse

if TYPE_CHECKING:
  from experiments.settings import ModelSettings, MoESettings, Settings

# objectives that a model of this kind can be trained on
_OBJECTIVES = {'decoder': ('causal',), 'encoder': ('masked',), 'vit': ('classify',)}


def check_model(model: ModelSettings) -> None:
  if not model.head_dim:
    _divides('model.d_model', model.d_model, 'model.num_heads', model.num_heads)
  if model.kind != 'vit' and model.positions == 'rotary' and model.attention != 'latent':
    _check_pairs(model)
  if model.num_kv_heads:
    _divides('model.num_heads', model.num_heads, 'model.num_kv_heads', model.num_kv_heads)
  if model.attention != 'grouped':
    _check_attention(model)
  _check_of_kind(model)
  moe = model.moe
  if model.depth.layers != 'none':
    _check_layers('model.depth.layers', model.depth.layers, model.depth_layers, model.num_layers)
    if model.kind == 'vit' or moe.pyramid:
      accepted = "'none' for model.kind='vit' and for pyramids"
      raise refuse('model.depth.layers', model.depth.layers, accepted)
  if moe.layers == 'none':
    return
  _check_layers('model.moe.layers', moe.layers, model.moe_layers, model.num_layers)
  if moe.d_ff:
    _divides('model.moe.d_ff', moe.d_ff, 'model.moe.granularity', moe.granularity)
  else:
    _divides('model.d_ff', model.d_ff, 'model.moe.granularity', moe.granularity)
  _check_router(moe)
  _check_implementation(moe)
  if moe.pyramid:
    _check_pyramid(model)


def _check_pairs(model: ModelSettings) -> None:
  if model.head_dim % 2:
    raise refuse('model.head_dim', model.head_dim, 'even: rotary positions turn pairs')
  if not model.head_dim and model.d_model // model.num_heads % 2:
    text = f'such that model.d_model={model.d_model} over it is even: rotary positions turn pairs'
    raise refuse('model.num_heads', model.num_heads, text)


def _check_layers(key: str, pattern: str, layers: tuple[int, ...], num_layers: int) -> None:
  within = layers and 0 <= layers[0] <= layers[-1] < num_layers
  if not within or len(set(layers)) < len(layers):
    text = f'distinct layers of the {num_layers} there are (model.num_layers)'
    raise refuse(key, pattern, text)


def _check_pyramid(model: ModelSettings) -> None:
  moe, counts = model.moe, model.moe_experts
  if len(counts) != len(model.moe_layers) or list(counts) != sorted(counts):
    text = (
      f'{len(model.moe_layers)} numbers, one a mixture, of which none is less than the one before'
    )
    raise refuse('model.moe.pyramid', moe.pyramid, text)
  if counts[-1] != moe.num_experts:
    raise refuse(
      'model.moe.num_experts', moe.num_experts, f'the last of model.moe.pyramid={moe.pyramid}'
    )


def _check_of_kind(model: ModelSettings) -> None:
  """What only an image model has, and what only the others have."""
  if model.kind == 'vit' and model.positions != 'rotary':
    raise refuse(
      'model.positions',
      model.positions,
      "'rotary' for model.kind='vit', which has a table of its own",
    )
  usual_of_vit = {
    'num_kv_heads': (0, model.num_heads),
    'head_dim': (0, model.d_model // model.num_heads),
    'qk_norm_scope': ('head',),
    'vocab_size': (0,),
  }
  for key, accepted in usual_of_vit.items():
    if model.kind == 'vit' and getattr(model, key) not in accepted:
      raise refuse(f'model.{key}', getattr(model, key), f"{accepted[0]!r} for model.kind='vit'")
  for key, usual in (('output', 'softmax'), ('head_bias', 0.0)):
    if model.kind != 'vit' and getattr(model, key) != usual:
      raise refuse(f'model.{key}', getattr(model, key), f'{usual!r} for model.kind={model.kind!r}')


def _check_attention(model: ModelSettings) -> None:
  if model.kind == 'vit':
    raise refuse('model.attention', model.attention, "'grouped' for model.kind='vit'")
  if model.positions != 'rotary':
    text = f"'rotary' with model.attention={model.attention!r}"
    raise refuse('model.positions', model.positions, text)
  if model.qk_norm:
    why = ', which norms its latents' if model.attention == 'latent' else ''
    raise refuse('model.qk_norm', True, f'False with model.attention={model.attention!r}{why}')
  if model.num_kv_heads not in (0, model.num_heads):
    text = f'0 or model.num_heads={model.num_heads} with model.attention={model.attention!r}'
    raise refuse('model.num_kv_heads', model.num_kv_heads, text)
  if model.attention == 'latent':
    _check_latent(model)


def _check_latent(model: ModelSettings) -> None:
  if not model.latent.kv_rank:
    raise refuse('model.latent.kv_rank', 0, "at least 1 with model.attention='latent'")
  if not model.latent.rotary_dim or model.latent.rotary_dim % 2:
    raise refuse(
      'model.latent.rotary_dim', model.latent.rotary_dim, 'even and at least 2: pairs are turned'
    )


def _check_router(moe: MoESettings) -> None:
  """The options that many routers share; the others are checked by the router when it is made."""
  name, k = moe.router.get('name'), moe.router.get('k', 1)
  if not isinstance(name, str) or not name:
    raise refuse('model.moe.router.name', name, 'the name of a router')
  most = moe.num_experts + sum(moe.zero_experts.values())
  if type(k) is not int or k < 1 or (k > most and name != 'ada_moe'):  # which adds null experts
    beside = ' and those without computation' if moe.zero_experts else ''
    text = f'an integer from 1 to model.moe.num_experts={moe.num_experts}{beside}'
    raise refuse('model.moe.router.k', k, text)
  factor = moe.router.get('capacity_factor', 1.0)
  if factor is None:
    return
  if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 0:
    text = 'a number more than 0, or None'
    raise refuse('model.moe.router.capacity_factor', factor, text)


def _check_implementation(moe: MoESettings) -> None:
  """Kernels, dispatch and exchange asked for by name must be what the mixture runs on."""
  if moe.kind in ('peer', 'deep', 'nested'):
    for key, usual in (('implementation', 'auto'), ('dispatch', 'fused'), ('exchange', 'auto')):
      if getattr(moe, key) != usual:
        text = f'{usual!r} with model.moe.kind={moe.kind!r}, which has no rows of experts'
        raise refuse(f'model.moe.{key}', getattr(moe, key), text)
  if moe.implementation == 'auto':
    return
  if moe.dispatch == 'einsum':
    raise refuse(
      'model.moe.implementation', moe.implementation, "'auto' with model.moe.dispatch='einsum'"
    )


def check_together(settings: Settings) -> None:
  _divides('batch_size', settings.batch_size, 'microbatches', settings.microbatches)
  kind, objective = settings.model.kind, settings.data.objective
  if objective not in _OBJECTIVES[kind]:
    accepted = f'{" or ".join(_OBJECTIVES[kind])} for model.kind={kind!r}'
    raise refuse('data.objective', objective, accepted)
  if settings.optim.consistency and settings.model.output == 'sigmoid':
    raise refuse('optim.consistency', settings.optim.consistency, "0 with model.output='sigmoid'")
  size, patch = settings.data.image_size, settings.model.patch_size
  if kind == 'vit' and size % patch:
    raise refuse(
      'data.image_size', size, f'0, that of the data, or a multiple of model.patch_size={patch}'
    )
  axes = {name: size for name, size in vars(settings.mesh).items() if size == -1}
  if len(axes) > 1:
    raise BadInput(
      f'only one mesh axis can be -1, the devices that are left, and here {", ".join(axes)} are'
    )
  moe, shards = settings.model.moe, settings.mesh.expert
  for count in sorted(set(settings.model.moe_experts)):
    if shards > 1 and count * moe.granularity % shards:
      experts = count * moe.granularity
      raise BadInput(f'num_experts={experts} does not divide over mesh axis expert={shards}')


def _divides(key: str, value: int, divisor_key: str, divisor: int) -> None:
  if value % divisor:
    raise refuse(key, value, f'a multiple of {divisor_key}={divisor}')
