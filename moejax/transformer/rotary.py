"""Rotary position embedding (Su et al. 2021, RoFormer, equation 34).

Pairs are (i, i + H/2), two contiguous halves, as in GPT-NeoX and Llama; the paper pairs (2i, 2i + 1).
The two differ by a fixed permutation of the columns of the query and key projections.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.transformer.linear import master_dtype


def rotation(
  positions: Int[Array, 'B S'], head_dim: int, *, theta: float = 10000.0
) -> tuple[Float[Array, 'B S half'], Float[Array, 'B S half']]:
  """Cosine and sine of `positions * theta^(-2i/H)`, for i < H/2, in float32.

  Raises:
    ValueError: if head_dim is odd.
  """
  if head_dim % 2:
    raise ValueError(f'head_dim={head_dim} is odd; rotary positions turn pairs, so it must be even')
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  angle = positions.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
  return jnp.cos(angle), jnp.sin(angle)


def rotate(
  x_bsnh: Float[Array, 'B S N H'],
  cos: Float[Array, '#B S half'],
  sin: Float[Array, '#B S half'],
) -> Float[Array, 'B S N H']:
  """`x` with each pair turned by its angle. A batch of one set of positions serves every sequence."""
  dtype = master_dtype(x_bsnh.dtype)
  cos, sin = cos[:, :, None, :].astype(dtype), sin[:, :, None, :].astype(dtype)
  x = x_bsnh.astype(dtype)
  other = jnp.roll(x, x.shape[-1] // 2, axis=-1)  # the other half of each pair
  # A sum of two products vectorises on a CPU where a concatenation of two halves does not.
  turned = x * jnp.concatenate([cos, cos], -1) + other * jnp.concatenate([-sin, sin], -1)
  return turned.astype(x_bsnh.dtype)
