"""Kinds of mixtures by their short names: what `config.model.moe.kind` may be."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from moejax.moe.cartesian import CartesianMoE
from moejax.moe.deep import DeepMoE
from moejax.moe.layer import MoE
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
    d_model, d_ff, num_experts, router: as of `MoE`. Kinds that bring a router of their own (those of `BARE`) do not
      look at it.
    options: of this kind alone.
    common: of `MoE`.
    rngs: source of the initial parameters.

  Raises:
    ValueError: an unknown kind, or an option that it does not have or that is out of its range.
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
    for name, usual in USUAL.items():
      if name in common and (common[name] or usual) != usual:
        raise ValueError(f'{name}={common[name]} with kind {kind!r}: accepted is {usual!r}')
    common = {name: value for name, value in common.items() if name in BARE[kind]}
  return make(d_model, d_ff, num_experts, router, **common, **options, rngs=rngs)
