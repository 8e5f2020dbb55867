"""All routers by their short names."""

import difflib
import inspect
from collections.abc import Callable

from flax import nnx

from moejax.routers.dense import dense
from moejax.routers.expert_choice import expert_choice
from moejax.routers.router import Flags as Flags
from moejax.routers.router import Router as Router
from moejax.routers.router import RouterBias as RouterBias
from moejax.routers.soft import soft
from moejax.routers.top_k import gshard, switch, top_k

ROUTERS: dict[str, Callable[..., Router]] = {
  'dense': dense,
  'expert_choice': expert_choice,
  'gshard': gshard,
  'soft': soft,
  'switch': switch,
  'top_k': top_k,
}


def router_names() -> tuple[str, ...]:
  """The short names that `make_router` accepts, sorted."""
  return tuple(sorted(ROUTERS))


def make_router(name: str, *, d_model: int, num_experts: int, rngs: nnx.Rngs, **options) -> Router:
  """A router by its short name.

  Args:
    name: one of `router_names()`.
    d_model: D.
    num_experts: E.
    rngs: source of the initial parameters.
    options: the keyword arguments of the router's own function, e.g. `k=2` of `top_k`.

  Raises:
    ValueError: an unknown name or option, or an option out of its range.
  """
  check_router_options(name, options)
  return ROUTERS[name](d_model=d_model, num_experts=num_experts, rngs=rngs, **options)


def router_options(name: str) -> tuple[str, ...]:
  """Names of the options that a router takes beside d_model, num_experts and rngs."""
  if name not in ROUTERS:
    raise ValueError(
      f'router name={name!r}: accepted are {", ".join(router_names())}{_nearest(name, ROUTERS)}'
    )
  own: dict[str, None] = {}
  takes_top_k_options = False
  for parameter in inspect.signature(ROUTERS[name]).parameters.values():
    takes_top_k_options |= parameter.kind is parameter.VAR_KEYWORD
    if parameter.kind is not parameter.VAR_KEYWORD:
      own[parameter.name] = None
  if takes_top_k_options:  # switch and gshard fix k of top_k and pass the rest on
    own |= {p: None for p in inspect.signature(top_k).parameters if p != 'k'}
  return tuple(p for p in own if p not in ('d_model', 'num_experts', 'rngs'))


def check_router_options(name: str, options: dict) -> None:
  """Raises ValueError for an unknown router or an option that it does not take."""
  accepted = router_options(name)
  for option in options:
    if option not in accepted:
      raise ValueError(
        f'option {option!r} of router {name!r}: accepted are {", ".join(accepted) or "none"}'
        f'{_nearest(option, accepted)}'
      )


def _nearest(word: str, accepted) -> str:
  near = difflib.get_close_matches(word, list(accepted), n=1)
  return f'; did you mean {near[0]!r}?' if near else ''
