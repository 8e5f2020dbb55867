"""Adafactor (Shazeer & Stern 2018): second moments as a product of two vectors, small beside the parameters.

The settings of two families of papers:
  GLaM and expert choice: b1 = 0, b2 = 0.99, clip_threshold 1, parameter_scale (Du et al. 2022, section 5).
  Scaling ViT: b1 = 0.9 held in bfloat16, b2 = 0.999, no clipping of updates, no parameter_scale, factor_from 32
    (Zhai et al. 2022, section 3.4, and big_vision).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.settings import OptimSettings

DECAY_POWER = 0.8
SMALLEST_SCALE = 1e-3  # epsilon 2 of the paper: a parameter that is zero moves all the same


def scale_by_adafactor(optim: OptimSettings) -> optax.GradientTransformation:
  """The direction of Adafactor, to be multiplied by the learning rate.

  Second moments decay at min(b2, 1 - step^-0.8): the first step has the gradient alone. The two longest axes of a
  parameter are factored where both have `factor_from` or more; of stacked layers, and of experts, each has moments of
  its own as long as there are fewer of them than the matrix is long and wide. Root mean squares, of an update to clip
  and of a parameter to scale by, are those of one layer.

  Deviation: the first moment is of updates without the learning rate, as in big_vision; optax.adafactor has it inside.
  """
  extra = optim.adafactor

  def decay(step: jax.typing.ArrayLike, power: Any) -> jax.Array:
    since = jnp.asarray(step).astype(jnp.float32) + 1.0
    return jnp.minimum(optim.b2, 1.0 - since ** (-power))

  return optax.chain(
    optax.scale_by_factored_rms(
      decay_rate=DECAY_POWER, min_dim_size_to_factor=extra.factor_from, decay_rate_fn=decay
    ),
    _by_layer(lambda u, p: u / jnp.maximum(1.0, rms(u) / extra.clip_threshold))
    if extra.clip_threshold
    else optax.identity(),
    _by_layer(lambda u, p: u * jnp.maximum(rms(p), SMALLEST_SCALE))
    if extra.parameter_scale
    else optax.identity(),
    optax.ema(optim.b1, debias=False, accumulator_dtype=jnp.bfloat16)
    if optim.b1
    else optax.identity(),
  )


def rms(x: jax.Array) -> jax.Array:
  """Root of the mean of squares."""
  return jnp.sqrt(jnp.mean(jnp.square(x)))


def _by_layer(
  change: Callable[[jax.Array, jax.Array], jax.Array],
) -> optax.GradientTransformation:
  """`change(update, parameter)` of every parameter, layer by layer of what a stack holds stacked."""

  def one(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
    stacked = '/segments/' in jax.tree_util.keystr(path, simple=True, separator='/')
    return (jax.vmap(change) if stacked and update.ndim else change)(update, param)

  return optax.stateless(
    lambda updates, params: jax.tree_util.tree_map_with_path(one, updates, params)
  )
