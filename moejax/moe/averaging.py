"""Experts that are kept alike: weight averaging, collapse to a dense layer, and the consistency loss of THOR."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def average_experts(params_e: Any, rate: jax.typing.ArrayLike, axis: int = 0) -> Any:
  """Every expert moves towards the mean of the others: `(1 - rate) W_i + rate * mean of W_j, j != i`.

  A controller, applied after the optimizer's step, to parameters alone and not to the optimizer's moments. The mean
  over experts stays; their distance from it shrinks to `1 - rate * E / (E - 1)` of what it was, to nothing at
  rate = (E - 1) / E. Huang et al. 2023, "Experts weights averaging", where the rate grows linearly from 0 over
  training; the final rate is a hyperparameter (0.001 to 0.3).

  Args:
    params_e: pytree of the weights of a bank, such as those of `Experts`.
    rate: share rate.
    axis: of the experts (1 where a layer axis comes first).
  """

  def average(weight: Array) -> Array:
    num_experts = weight.shape[axis]
    if num_experts == 1:
      return weight
    pull = jnp.asarray(rate, weight.dtype) * jnp.asarray(
      num_experts / (num_experts - 1), weight.dtype
    )
    return weight + pull * (weight.mean(axis, keepdims=True) - weight)

  return jax.tree.map(average, params_e)


def average_banks(params: Any, rate: jax.typing.ArrayLike) -> Any:
  """`average_experts` for every bank of experts of a model; what is no bank stays as it is.

  Args:
    params: pure dict of a model's parameters, those of a bank `[L, E, ...]` (moejax/transformer/stack.py).
    rate: share rate.
  """

  def one(path, leaf: Array) -> Array:
    names = [str(key.key) for key in path]
    return average_experts(leaf, rate, axis=1) if 'experts' in names else leaf

  return jax.tree_util.tree_map_with_path(one, params)


def collapse(params_e: Any, axis: int = 0) -> Any:
  """The mean expert, `[E, ...] -> [...]`: the weights of a dense feed-forward layer."""
  return jax.tree.map(lambda weight: weight.mean(axis), params_e)


def consistency_loss(
  logits_a: Float[Array, '*batch S V'],
  logits_b: Float[Array, '*batch S V'],
  mask: Bool[Array, '*batch S'] | None = None,
) -> Float[Array, '']:
  """`(KL(a | b) + KL(b | a)) / 2` of the predictions of two passes, mean over real tokens.

  THOR, Zuo et al. 2022, equation 4; its code sums over tokens as it sums the cross-entropy. In nats, gradients
  through both.

  Args:
    logits_a, logits_b: of the model's output.
    mask: True for real tokens.
  """
  log_a, log_b = (jax.nn.log_softmax(logits, -1) for logits in (logits_a, logits_b))
  half = jnp.asarray(0.5, log_a.dtype)
  divergence = half * ((jnp.exp(log_a) - jnp.exp(log_b)) * (log_a - log_b)).sum(-1)
  mask = jnp.ones(divergence.shape, bool) if mask is None else mask
  return jnp.where(mask, divergence, 0).sum() / jnp.maximum(mask.sum(), 1).astype(log_a.dtype)
