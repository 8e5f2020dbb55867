"""All routers by their short names."""

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable

from flax import nnx

from moejax.option_types import check_types
from moejax.routers.ada_moe import ada_moe
from moejax.routers.base import base
from moejax.routers.cosine import cosine
from moejax.routers.dense import dense
from moejax.routers.dense_to_sparse import dense_to_sparse
from moejax.routers.ds_moe import ds_moe
from moejax.routers.ewa import ewa
from moejax.routers.expert_choice import expert_choice
from moejax.routers.family import family
from moejax.routers.gating_residual import gating_residual
from moejax.routers.group_limited import group_limited
from moejax.routers.hash import hash_layer
from moejax.routers.image import image
from moejax.routers.kamoe import kamoe
from moejax.routers.locmoe import locmoe
from moejax.routers.m3vit import m3vit
from moejax.routers.mask_moe import mask_moe
from moejax.routers.mixture_of_tokens import mixture_of_tokens
from moejax.routers.modified_softmax import modified_softmax
from moejax.routers.moec import moec
from moejax.routers.noisy_top_k import noisy_top_k
from moejax.routers.pre_gated import pre_gated
from moejax.routers.raphael import space_moe, time_moe
from moejax.routers.read_me import read_me, read_me_shared
from moejax.routers.rmoe import rmoe, rmoe_shared
from moejax.routers.router import Flags as Flags
from moejax.routers.router import Router as Router
from moejax.routers.router import RouterBias as RouterBias
from moejax.routers.sinkhorn import sinkhorn, sinkhorn_expert_choice
from moejax.routers.smile import smile
from moejax.routers.smoe_dropout import smoe_dropout
from moejax.routers.soft import soft
from moejax.routers.sparse_expert_choice import sparse_expert_choice
from moejax.routers.spatial import spatial
from moejax.routers.speech_moe import speech_moe
from moejax.routers.thor import thor
from moejax.routers.top_k import gshard, switch, token_choice, top_k, vmoe
from moejax.routers.top_p import top_p
from moejax.sizes import check_made_of

ROUTERS: dict[str, Callable[..., Router]] = {
  'ada_moe': ada_moe,
  'base': base,
  'cosine': cosine,
  'dense': dense,
  'dense_to_sparse': dense_to_sparse,
  'ds_moe': ds_moe,
  'ewa': ewa,
  'expert_choice': expert_choice,
  'family': family,
  'gating_residual': gating_residual,
  'group_limited': group_limited,
  'gshard': gshard,
  'hash': hash_layer,
  'image': image,
  'kamoe': kamoe,
  'locmoe': locmoe,
  'm3vit': m3vit,
  'mask_moe': mask_moe,
  'mixture_of_tokens': mixture_of_tokens,
  'modified_softmax': modified_softmax,
  'moec': moec,
  'noisy_top_k': noisy_top_k,
  'pre_gated': pre_gated,
  'read_me': read_me,
  'rmoe': rmoe,
  'sinkhorn': sinkhorn,
  'sinkhorn_expert_choice': sinkhorn_expert_choice,
  'smile': smile,
  'smoe_dropout': smoe_dropout,
  'soft': soft,
  'space_moe': space_moe,
  'sparse_expert_choice': sparse_expert_choice,
  'spatial': spatial,
  'speech_moe': speech_moe,
  'switch': switch,
  'thor': thor,
  'time_moe': time_moe,
  'top_k': top_k,
  'top_p': top_p,
  'vmoe': vmoe,
}

PASSED_ON: dict[Callable[..., Router], tuple[Callable[..., Router], tuple[str, ...]]] = {
  cosine: (token_choice, ()),
  gating_residual: (token_choice, ()),
  group_limited: (token_choice, ()),
  gshard: (top_k, ('k',)),
  image: (token_choice, ()),
  locmoe: (token_choice, ('k',)),
  m3vit: (token_choice, ()),
  mask_moe: (token_choice, ('balance_bias',)),
  modified_softmax: (token_choice, ()),
  noisy_top_k: (token_choice, ()),
  pre_gated: (token_choice, ()),
  read_me: (token_choice, ()),
  rmoe: (token_choice, ()),
  sinkhorn: (token_choice, ('balance_bias',)),
  spatial: (token_choice, ()),
  speech_moe: (token_choice, ()),
  switch: (top_k, ('k',)),
  time_moe: (token_choice, ()),
  top_k: (token_choice, ()),
  vmoe: (top_k, ()),
}
"""Where a function passes its `**options` on to, and which of those it fixes."""

SHARED: dict[str, Callable[..., nnx.Module | None]] = {
  'read_me': read_me_shared,
  'rmoe': rmoe_shared,
}
"""What a stack keeps for all its routers of a name."""


def router_names() -> tuple[str, ...]:
  """The short names that `make_router` accepts, sorted."""
  return tuple(sorted(ROUTERS))


def make_router(name: str, *, d_model: int, num_experts: int, rngs: nnx.Rngs, **options) -> Router:
  """A router by its short name.

  Args:
    name: one of `router_names()`, or 'module:function' for a router of your own: a function of the arguments below.
    d_model: D.
    num_experts: E.
    rngs: source of the initial parameters.
    options: the keyword arguments of the router's own function, e.g. `k=2` of `top_k`.

  Raises:
    ValueError: an unknown name or option, or an option out of its range.
  """
  check_router_options(name, options)
  check_made_of(rngs, d_model=d_model, num_experts=num_experts)
  router = find_router(name)(d_model=d_model, num_experts=num_experts, rngs=rngs, **options)
  router.d_model = d_model
  return router


def find_router(name: str) -> Callable[..., Router]:
  """The function that makes routers of this name.

  Raises:
    ValueError: an unknown name; of 'module:function', a module or function that is not there.
  """
  if name in ROUTERS:
    return ROUTERS[name]
  module, colon, function = name.partition(':')
  if not colon:
    raise ValueError(
      f'router name={name!r}: accepted are {", ".join(router_names())}{_nearest(name, ROUTERS)}'
    )
  if importlib.util.find_spec(module.partition('.')[0]) is None:
    raise ValueError(f'router name={name!r}: there is no module {module!r} to import')
  found = getattr(importlib.import_module(module), function, None)
  if not callable(found):
    raise ValueError(f'router name={name!r}: module {module!r} has no function {function!r}')
  return found


def make_shared(
  name: str, *, d_model: int, num_experts: int, rngs: nnx.Rngs, **options
) -> nnx.Module | None:
  """What a stack keeps for all its routers of this name and these options (`Stack`); None of most.

  Raises:
    ValueError: as `make_router`.
  """
  check_router_options(name, options)
  if name not in SHARED:
    return None
  return SHARED[name](d_model=d_model, num_experts=num_experts, rngs=rngs, **options)


def router_options(name: str) -> tuple[str, ...]:
  """Names of the options that a router takes beside d_model, num_experts and rngs."""
  return tuple(_takers(name))


def _takers(name: str) -> dict[str, Callable[..., Router]]:
  """Option -> the function that it comes to."""
  hidden = {'d_model', 'num_experts', 'rngs', 'scorer', 'affinity'}
  takers: dict[str, Callable[..., Router]] = {}
  function: Callable[..., Router] | None = find_router(name)
  while function is not None:
    parameters = inspect.signature(function).parameters.values()
    for p in parameters:
      if p.kind is not p.VAR_KEYWORD and p.name not in hidden:
        takers.setdefault(p.name, function)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters)
    function, fixed = PASSED_ON.get(function, (None, ())) if passes_on else (None, ())
    hidden |= set(fixed)
  return takers


def count_option(name: str) -> str | None:
  """The option that says how many experts work on a token, None where that is fixed."""
  if name in ('expert_choice', 'sinkhorn_expert_choice', 'sparse_expert_choice'):
    return 'capacity_factor'
  return 'k' if 'k' in router_options(name) else None


def check_router_options(name: str, options: dict) -> None:
  """Raises ValueError for an unknown router, an option that it does not take, or one of another type."""
  accepted = _takers(name)
  for option in options:
    if option not in accepted:
      raise ValueError(
        f'option {option!r} of router {name!r}: accepted are {", ".join(accepted) or "none"}'
        f'{_nearest(option, accepted)}'
      )
    check_types(f'router {name!r}', accepted[option], {option: options[option]})


def _nearest(word: str, accepted) -> str:
  near = difflib.get_close_matches(word, list(accepted), n=1)
  return f'; did you mean {near[0]!r}?' if near else ''
