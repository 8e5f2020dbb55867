"""Kinds of mixtures by their short names: what `config.model.moe.kind` may be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from moejax.moe.cartesian import CartesianMoE
from moejax.moe.deep import DeepMoE
from moejax.moe.layer import MoE
from moejax.moe.losses import LOSSES
from moejax.moe.multi_head import MultiHeadMoE
from moejax.moe.nested import NestedFFN
from moejax.moe.peer import Peer
from moejax.option_types import check_types


def _peer(d_model, d_ff, num_experts, router, **options):
  return Peer(d_model, num_experts, **options)


def _deep(d_model, d_ff, num_experts, router, **options):
  return DeepMoE(d_model, d_ff, num_experts, **options)


def _nested(d_model, d_ff, num_experts, router, **options):
  return NestedFFN(d_model, d_ff, num_experts, **options)


KINDS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
  'experts': (MoE, ('widths',)),
  'residual': (functools.partial(MoE, core=True), ('core_noise', 'forward_one')),
  'multi_head': (MultiHeadMoE, ('heads', 'widths')),
  'cartesian': (CartesianMoE, ()),
  'peer': (_peer, ('heads', 'k', 'query_width', 'query_norm', 'keys_per_head', 'score')),
  'deep': (_deep, ('gate_width',)),
  'nested': (_nested, ('effective',)),
}
"""Name -> (what makes one, its own options)."""

BARE: dict[str, tuple[str, ...]] = {
  'peer': ('losses', 'activation', 'dtype', 'out_scale'),
  'deep': ('losses', 'dtype', 'out_scale'),
  'nested': ('losses', 'activation', 'gated', 'dtype', 'out_scale'),
}
"""Kinds that take no more than these of the options below; the others take all."""

UNMOVED: dict[str, tuple[str, ...]] = {
  'peer': ('cluster_balance', 'guidance', 'load', 'locality'),
  'deep': (
    'balance',
    'cluster_balance',
    'cost_balance',
    'guidance',
    'load',
    'locality',
    'member_balance',
    'sequence_balance',
  ),
  'nested': ('cluster_balance', 'guidance', 'load', 'locality'),
}
"""Losses that have no gradient in a kind with a router of its own, which has no noise, no clusters and nobody to guide
it; those by choice are constant where every expert is chosen."""

NO_ROUTER = {'name': 'top_k', 'k': 2}
"""What a config says of the router where nothing is asked for (configs/common.py)."""

USUAL: dict[str, Any] = {
  'granularity': 1,
  'num_shared': 0,
  'shared_mix': False,
  'zero_experts': {},
  'zero_cost': 1.0,
  'output_norm': False,
  'momentum': None,
}
"""Options of `MoE` and the value of each that asks for nothing."""


def make_layer(
  kind: str,
  d_model: int,
  d_ff: int,
  num_experts: int,
  router: Any,
  *,
  options: Mapping[str, Any] | None = None,
  rngs: nnx.Rngs,
  **common: Any,
) -> Any:
  """A mixture of this kind.

  Args:
    kind: a name of `KINDS`.
    d_model, d_ff, num_experts, router: as of `MoE`. Kinds that bring a router of their own (those of `BARE`) take None
      or what a config says where nothing is asked for, and do not look at it.
    options: of this kind alone.
    common: of `MoE`.
    rngs: source of the initial parameters.

  Raises:
    ValueError: an unknown kind, or an option, router or loss that it does not have or that is out of its range.
  """
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r}: accepted are {", ".join(map(repr, KINDS))}')
  make, own = KINDS[kind]
  options = dict(options or {})
  for option in options:
    if option not in own:
      raise ValueError(
        f'option {option!r} of kind {kind!r}: accepted are {", ".join(own) or "none"}'
      )
  bare = {'peer': Peer, 'deep': DeepMoE, 'nested': NestedFFN}.get(kind)
  for annotated in (bare,) if bare else (make, MoE):
    check_types(f'kind {kind!r}', annotated, options)
  if kind in BARE:
    _check_no_router(kind, router)
    check_moves(kind, common.get('losses') or {})
    for name, usual in USUAL.items():
      if name in common and (common[name] or usual) != usual:
        raise ValueError(f'{name}={common[name]} with kind {kind!r}: accepted is {usual!r}')
    common = {name: value for name, value in common.items() if name in BARE[kind]}
  return make(d_model, d_ff, num_experts, router, **common, **options, rngs=rngs)


def check_moves(kind: str, losses: Mapping[str, float]) -> None:
  """Refuses losses (name -> coefficient) that would be added up and move nothing in a kind with its own router.

  Raises:
    ValueError: a name of `UNMOVED` with another coefficient than 0.
  """
  unmoved = UNMOVED.get(kind, ())
  for name, value in losses.items():
    if name in unmoved and value:
      raise ValueError(
        f'losses.{name}={value} with kind {kind!r}, where it has no gradient: accepted are 0 and the losses '
        f'{", ".join(sorted(set(LOSSES) - set(unmoved)))}'
      )


def _check_no_router(kind: str, router: Any) -> None:
  """Raises ValueError for a router, or an option of one, that is more than `NO_ROUTER`."""
  if router is None:
    return
  given = {'name': router} if isinstance(router, str) else router
  if not isinstance(given, Mapping):
    given = {'name': type(router).__name__}
  for key, value in given.items():
    if key not in NO_ROUTER or value != NO_ROUTER[key]:
      raise ValueError(
        f'router.{key}={value!r} with kind {kind!r}, which has its own router: accepted is router={NO_ROUTER}, the '
        f'default, and the options {", ".join(KINDS[kind][1])} of the kind'
      )
