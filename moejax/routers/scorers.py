"""Scorers: token -> one logit an expert, in float32 or wider."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.arrays import Context
from moejax.transformer.linear import product


class Frozen(nnx.Variable):
  """Drawn once and never changed (tables, masks, random kernels): in the checkpoint, not in the optimizer."""


class LinearScorer(nnx.Module):
  """`logits = x W`, no bias; optional jitter on the input and Gaussian noise on the logits.

  Args:
    d_model: D.
    num_experts: E.
    noise_std: in training, the selection sees `logits + N(0, (noise_std / E)^2)` (V-MoE, Riquelme et al.
      2021, section 2.2).
    jitter: in training, the router alone sees `x * U(1 - jitter, 1 + jitter)` (Switch, Fedus et al. 2021,
      appendix C).
    init_std: standard deviation of the initial kernel; default 1 / sqrt(D).
    init: initializer instead of a truncated normal of `init_std`.
    rngs: source of the initial kernel.

  Raises:
    ValueError: `noise_std`, `jitter` or `init_std` below 0.
  """

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    *,
    noise_std: float = 0.0,
    jitter: float = 0.0,
    init_std: float | None = None,
    init: Callable[..., Array] | None = None,
    rngs: nnx.Rngs,
  ):
    for name, value in {'noise_std': noise_std, 'jitter': jitter, 'init_std': init_std}.items():
      if value is not None and not value >= 0:
        raise ValueError(f'{name}={value}: accepted are numbers from 0')
    std = d_model**-0.5 if init_std is None else init_std
    init = init or nnx.initializers.truncated_normal(std)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), jnp.float32))
    self.noise_std = noise_std
    self.jitter = jitter

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], Float[Array, ''] | None]:
    """Clean logits, and the standard deviation of the noise to add to them (None: no noise).

    Raises:
      ValueError: in training with noise or jitter but without `context.rng`.
    """
    if context.train and (self.noise_std or self.jitter) and context.rng is None:
      raise ValueError(
        f'noise_std={self.noise_std}, jitter={self.jitter} need context.rng in training: got None'
      )
    kernel_de = self.kernel[...].astype(x_bsd.dtype)
    if context.train and self.jitter:
      key = jax.random.fold_in(context.rng, 1)
      low, high = 1.0 - self.jitter, 1.0 + self.jitter
      x_bsd = x_bsd * jax.random.uniform(key, x_bsd.shape, x_bsd.dtype, low, high)
    logits_bse = product(x_bsd, kernel_de)
    if not (context.train and self.noise_std):
      return logits_bse, None
    return logits_bse, jnp.asarray(self.noise_std / kernel_de.shape[1], x_bsd.dtype)


def context_key(context: Context, stream: int, what: str) -> Array:
  """A key of the call for one purpose; every purpose has a `stream` of its own.

  Raises:
    ValueError: without `context.rng`.
  """
  return jax.random.fold_in(check_key(context, what), stream)


def check_key(context: Context, what: str) -> Array:
  """`context.rng`.

  Raises:
    ValueError: there is none.
  """
  if context.rng is None:
    raise ValueError(f'{what} needs context.rng in training: got None')
  return context.rng


def check_from_one(**values: int) -> None:
  """Raises ValueError for an option below 1."""
  for key, value in values.items():
    if value < 1:
      raise ValueError(f'{key}={value}: accepted are integers from 1')


def only(expert_bs: Int[Array, 'B S'], num_experts: int, dtype) -> Float[Array, 'B S E']:
  """Logits of which the softmax is one expert with certainty: 0 there, -inf elsewhere."""
  chosen_bse = expert_bs[..., None] == jnp.arange(num_experts, dtype=expert_bs.dtype)[None, None]
  return jnp.where(chosen_bse, 0, -jnp.inf).astype(dtype)
