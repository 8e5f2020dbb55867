"""The mixtures of a model, and what is known of them before they exist."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.settings import ModelSettings
from moejax.moe.kinds import make_layer
from moejax.routers import SHARED, Flags, make_shared


@dataclasses.dataclass(frozen=True)
class RouterFacts:
  """What is known of a mixture and its router before they exist.

  Attributes:
    flags: what it promises.
    has_bias: whether it has a bias that loss-free balancing moves.
    slots: whether experts work on slots, mixed of all tokens, instead of rows.
    rows_per_token: sequence length -> mean number of experts (or slots) that work on a token.
    active_share: sequence length -> fraction of the experts' parameters that work on a token.
    flops: sequence length -> FLOPs of one token in the layer, by part.
  """

  flags: Flags
  has_bias: bool
  slots: bool
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
  known = (layer.flags, has_bias, router is not None and bool(router.slots))
  asked = ('rows_per_token', 'active_share', 'flops_per_token')
  if len(layers) == 1:
    return RouterFacts(*known, *(getattr(layer, name) for name in asked))
  return RouterFacts(*known, *_means([layers[count] for count in model.moe_experts]))


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


def make_mixture(model: ModelSettings, num_experts: int, options: dict[str, Any], rngs: nnx.Rngs):
  return _layer(model, num_experts, **options, rngs=rngs)


def shared_maker(model: ModelSettings) -> Callable[[nnx.Rngs], nnx.Module] | None:
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
