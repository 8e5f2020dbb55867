"""What our own language models have: parameters of the model itself, and model FLOPs of training it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.transformer.flops import Flops, forward_flops_per_token, moe_flops_per_token
from moejax.transformer.latent_attention import Latent

COUNTED = ('experts', 'residual')
"""Kinds of mixtures whose work is known of their sizes and choices alone."""


@dataclasses.dataclass(frozen=True)
class ModelCost:
  """The columns of a results table that hang on the model alone.

  Attributes:
    N: parameters of the layers, norms among them: no embedding, no head, no router (as in Krajewski et al. 2024).
    N_active: those of N that work on a token, with the mean number of experts that do.
    embedding, router: what N leaves out; embedding is that and the head, once where they are tied.
    flops_per_token: of training: three times the forward pass, head and attention scores counted.
  """

  N: int
  N_active: float
  embedding: int
  router: int
  flops_per_token: float


def model_cost(
  model: Any,
  counts: Mapping[str, int],
  *,
  vocab_size: int,
  sequence_length: int,
  choices: float | int = 0.0,
  layer: Any = None,
) -> ModelCost:
  """The cost of one language model.

  Args:
    model: the model section of an experiment's settings, resolved (`Settings.model`).
    counts: parameters by part, `count_params` of the model's own parameters; shapes are enough.
    vocab_size: V.
    sequence_length: S.
    choices: mean number of routed experts that work on a token: `router.rows_per_token(sequence_length)`. Of mixtures
      of the kind 'experts', and 'residual'; the other kinds are asked themselves.
    layer: one mixture of the model, of any kind: `flops_per_token` and `active_share` are called; shapes are enough
      (`jax.eval_shape`). None with `choices`.

  Raises:
    ValueError: a model of images, or a mixture without choices and without a layer.
  """
  if model.kind == 'vit':
    raise ValueError("model.kind='vit': accepted are 'decoder' and 'encoder', laws count tokens")
  if model.moe_layers and layer is None and choices <= 0:
    raise ValueError(f'choices={choices} of a mixture: accepted is more than 0')
  if model.moe_layers and layer is None and model.moe.kind not in COUNTED:
    raise ValueError(
      f'layer=None with model.moe.kind={model.moe.kind!r}: accepted is a mixture of the model, or a kind of '
      f'{", ".join(map(repr, COUNTED))}'
    )
  num_experts = model.moe.num_experts * model.moe.granularity
  active = choices / num_experts if layer is None else layer.active_share(sequence_length)
  experts = counts.get('moe/experts', 0)
  embedding = counts['embed'] + counts.get('head', 0)
  router = counts.get('moe/router', 0)
  layers = counts['total'] - embedding - router
  idle = experts * (1 - min(1.0, active)) if experts else 0.0
  flops = forward_flops_per_token(
    vocab_size=vocab_size,
    d_model=model.d_model,
    num_layers=model.num_layers,
    num_heads=model.num_heads,
    d_ff=model.d_ff,
    seq_len=sequence_length,
    num_kv_heads=model.num_kv_heads,
    head_dim=model.head_dim,
    gated=model.gated,
    latent=latent_of(model),
    num_moe_layers=len(model.moe_layers),
    moe=_by_choices(model, choices) if layer is None else layer.flops_per_token(sequence_length),
  )
  return ModelCost(layers, layers - idle, embedding, router, 3.0 * sum(flops.values()))


def _by_choices(model: Any, choices: float | int) -> Flops:
  return moe_flops_per_token(
    d_model=model.d_model,
    d_ff=model.moe.d_ff // model.moe.granularity,
    num_experts=model.moe.num_experts * model.moe.granularity,
    experts_per_token=choices,
    num_shared=model.moe.num_shared,
    gated=model.gated,
  )


def latent_of(model: Any) -> Latent | None:
  """Sizes of the model's latent attention; None of one with grouped queries.

  Args:
    model: see `model_cost`.
  """
  return Latent(**vars(model.latent)) if model.attention == 'latent' else None
