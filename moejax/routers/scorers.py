"""Scorers: token -> one logit an expert, in float32 or wider."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context


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
    rngs: source of the initial kernel.
  """

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    *,
    noise_std: float = 0.0,
    jitter: float = 0.0,
    init_std: float | None = None,
    rngs: nnx.Rngs,
  ):
    std = d_model**-0.5 if init_std is None else init_std
    kernel = nnx.initializers.truncated_normal(std)(
      rngs.params(), (d_model, num_experts), jnp.float32
    )
    self.kernel = nnx.Param(kernel)
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
    logits_bse = jnp.einsum('BSD,DE->BSE', x_bsd, kernel_de)
    if not (context.train and self.noise_std):
      return logits_bse, None
    return logits_bse, jnp.asarray(self.noise_std / kernel_de.shape[1], x_bsd.dtype)
