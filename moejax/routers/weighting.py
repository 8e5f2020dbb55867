"""Weights of the chosen experts: one table of the forms in the literature (README, Options)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Weights = Callable[[Array], Array]

LEAST = 1e-15
"""Sums count as no less; the gradient of a quotient has its inverse square, which must be a float32 too."""


def raw(gate: Float[Array, '*batch K']) -> Float[Array, '*batch K']:
  """The gate as it is: Switch, V-MoE, DeepSeekMoE (softmax); BASE (sigmoid)."""
  return gate


def normalised(gate: Float[Array, '*batch K']) -> Float[Array, '*batch K']:
  """Sum over the chosen is one: Shazeer et al., GShard, Mixtral (softmax); DeepSeek-V3 (sigmoid).

  With a softmax gate this equals a softmax over the chosen logits.
  """
  return gate / jnp.maximum(gate.sum(-1, keepdims=True), LEAST)


def normalised_stop_gradient(gate: Float[Array, '*batch K']) -> Float[Array, '*batch K']:
  """Sum is one, the gradient that of the raw gate: Mixture of Attention Heads, Zhang et al. 2022."""
  return gate / jax.lax.stop_gradient(jnp.maximum(gate.sum(-1, keepdims=True), LEAST))


def unweighted(gate: Float[Array, '*batch K']) -> Float[Array, '*batch K']:
  """Ones: hash layers, THOR. The router has no gradient from the task."""
  return jnp.ones_like(gate)


WEIGHTINGS: dict[str, tuple[str, Weights]] = {
  'softmax_topk': ('softmax', raw),
  'softmax_topk_norm': ('softmax', normalised),
  'topk_softmax': ('softmax', normalised),
  'softmax_topk_norm_sg': ('softmax', normalised_stop_gradient),
  'sigmoid': ('sigmoid', raw),
  'sigmoid_norm': ('sigmoid', normalised),
  'unweighted': ('softmax', unweighted),
}
"""Name -> (affinity, weights), the rows of the option table."""
