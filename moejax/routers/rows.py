"""Choices of every token -> an `Assignment` in token-major rows; what routers with any number of experts share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Assignment, Context


def token_rows(
  expert_bsk: Int[Array, 'B S K'],
  weight_bsk: Float[Array, 'B S K'],
  wanted_bsk: Bool[Array, 'B S K'],
  num_experts: int,
  context: Context,
) -> Assignment:
  """Row `t * K + j` is the j-th choice of token t; choices that are not wanted, and padding, are dropped."""
  num_sequences, num_positions, k = expert_bsk.shape
  num_tokens = num_sequences * num_positions
  if context.mask is not None:
    wanted_bsk = wanted_bsk & context.mask[..., None]
  expert_r = jnp.where(wanted_bsk, expert_bsk, num_experts).astype(jnp.int32).reshape(-1)
  return Assignment(
    token=jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), k),
    expert=expert_r,
    weight=jnp.where(wanted_bsk, weight_bsk, 0).reshape(-1),
    chosen=expert_r,
    num_experts=num_experts,
    groups=num_tokens,
  )
