"""Activations with their slopes, in operations that Mosaic lowers: `f(x)` and `f'(x)` of float32 values."""

import math

import jax.numpy as jnp

_GELU = math.sqrt(2 / math.pi), 0.044715  # the tanh approximation's constants


def _silu(x):
  # One tanh instruction instead of an exponential and a division.
  sigmoid = 0.5 * jnp.tanh(0.5 * x) + 0.5
  value = x * sigmoid
  return value, sigmoid + value * (1 - sigmoid)


def _gelu(x):
  scale, cubic = _GELU
  tanh = jnp.tanh(scale * (x + cubic * x * x * x))
  half = 0.5 * (1 + tanh)
  return x * half, half + 0.5 * x * (1 - tanh * tanh) * scale * (1 + 3 * cubic * x * x)


def _relu(x):
  return jnp.maximum(x, 0.0), jnp.where(x > 0, jnp.ones_like(x), jnp.zeros_like(x))


def _relu2(x):
  positive = jnp.maximum(x, 0.0)
  return positive * positive, 2 * positive


SLOPES = {'gelu': _gelu, 'relu': _relu, 'relu2': _relu2, 'silu': _silu}
