"""Layers of one matrix or one vector: Linear, Embed, RMSNorm, LayerNorm, and how they are initialised.

Master weights are float32; `dtype` is what weights and inputs are cast to where they are used. With
`dtype=float64` (under `jax_enable_x64`) the master weights are float64 too, so that gradients can be
checked against finite differences.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

Init = Callable[..., Array]

# Truncated normal of variance 1 / fan_in (LeCun 1998), the default of every hidden matrix.
fan_in_init: Init = nnx.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')

# Standard deviation 0.02 for token and position tables (GPT-2, BERT, ViT).
embed_init: Init = nnx.initializers.normal(0.02)

zeros_init: Init = nnx.initializers.zeros_init()


def residual_init(num_layers: int) -> Init:
  """Initialiser of matrices that write into the residual stream: `fan_in_init / sqrt(2 * num_layers)`.

  The stream adds up 2 * num_layers such outputs, so its variance at the top does not grow with depth
  (Radford et al. 2019, section 2.3).
  """
  return nnx.initializers.variance_scaling(1 / (2 * num_layers), 'fan_in', 'truncated_normal')


def master_dtype(dtype) -> jnp.dtype:
  """Dtype of stored weights, statistics and logits: float32, or float64 where `dtype` is."""
  return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def product(
  x: Float[Array, '*batch d_in'], weight: Float[Array, 'd_in d_out'], **options
) -> Float[Array, '*batch d_out']:
  """`x @ weight` with the batch as one axis.

  With more axes XLA makes a transposed copy of the whole gradient of the product before it multiplies it into that of
  the weight, which takes a CPU longer than multiplying. Options are those of `jnp.matmul`.
  """
  rows = jnp.matmul(x.reshape(-1, x.shape[-1]), weight, **options)
  return rows.reshape(*x.shape[:-1], weight.shape[1])


class Linear(nnx.Module):
  """`x @ weight + bias`, with weight `[d_in, d_out]`."""

  def __init__(
    self,
    d_in: int,
    d_out: int,
    *,
    use_bias: bool = False,
    dtype=jnp.float32,
    init: Init = fan_in_init,
    bias_init: Init = zeros_init,
    rngs: nnx.Rngs,
  ):
    self.dtype = jnp.dtype(dtype)
    self.weight = nnx.Param(init(rngs.params(), (d_in, d_out), master_dtype(dtype)))
    bias = bias_init(None, (d_out,), master_dtype(dtype)) if use_bias else None
    self.bias = None if bias is None else nnx.Param(bias)

  def __call__(
    self, x: Float[Array, '... d_in'], *, wide: bool = False
  ) -> Float[Array, '... d_out']:
    """`wide=True` returns the float32 accumulator of a low-precision product, as logits want it."""
    out_dtype = master_dtype(self.dtype) if wide else self.dtype
    weight = self.weight[...].astype(self.dtype)
    y = product(x.astype(self.dtype), weight, preferred_element_type=out_dtype)
    if self.bias is None:
      return y
    return y + jnp.expand_dims(self.bias[...].astype(out_dtype), range(y.ndim - 1))


class Embed(nnx.Module):
  """A table `[vocab_size, d_model]` of vectors, read by index or, transposed, as the output layer."""

  def __init__(
    self,
    vocab_size: int,
    d_model: int,
    *,
    dtype=jnp.float32,
    init: Init = embed_init,
    rngs: nnx.Rngs,
  ):
    self.dtype = jnp.dtype(dtype)
    self.weight = nnx.Param(init(rngs.params(), (vocab_size, d_model), master_dtype(dtype)))

  def __call__(self, tokens: Int[Array, '...']) -> Float[Array, '... D']:
    """Rows of the table. An id >= vocab_size gives NaN: wrong data shows at once in the loss."""
    rows = jnp.take(self.weight[...], tokens, axis=0, mode='fill', fill_value=jnp.nan)
    return rows.astype(self.dtype)  # cast after the gather: the gradient adds up in float32

  def attend(self, x: Float[Array, '... D']) -> Float[Array, '... V']:
    """Logits against every row (tied output layer), in float32 or wider."""
    weight = self.weight[...].astype(self.dtype)
    wide = master_dtype(self.dtype)
    return jnp.matmul(x.astype(self.dtype), weight.T, preferred_element_type=wide)


class RMSNorm(nnx.Module):
  """`x / rms(x) * scale` over the last axis, computed in float32 (Zhang & Sennrich 2019, equation 4)."""

  def __init__(self, d_model: int, *, dtype=jnp.float32, rngs: nnx.Rngs | None = None):
    self.dtype = jnp.dtype(dtype)
    self.scale = nnx.Param(jnp.ones((d_model,), master_dtype(dtype)))

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    x = x.astype(master_dtype(self.dtype))
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
    return (x * inverse * scale).astype(self.dtype)


class LayerNorm(nnx.Module):
  """`(x - mean) / std * scale + bias` over the last axis, computed in float32 (Ba et al. 2016)."""

  def __init__(self, d_model: int, *, dtype=jnp.float32, rngs: nnx.Rngs | None = None):
    self.dtype = jnp.dtype(dtype)
    self.scale = nnx.Param(jnp.ones((d_model,), master_dtype(dtype)))
    self.bias = nnx.Param(jnp.zeros((d_model,), master_dtype(dtype)))

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    x = x.astype(master_dtype(self.dtype))
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
    bias = jnp.expand_dims(self.bias[...], range(x.ndim - 1))
    return (x * inverse * scale + bias).astype(self.dtype)
