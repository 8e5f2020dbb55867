"""The definition of the routing metadata: stable sorts."""

import jax
import jax.numpy as jnp


def top_k(logits_te, k):
  """By a stable sort on (is NaN, logit), both descending."""
  nan = jnp.isnan(logits_te)
  # The last key counts most; a stable ascending sort of -logit leaves ties in the order of their index.
  order = jnp.lexsort((jnp.where(nan, 0, -logits_te), ~nan), axis=1)
  expert = order[:, :k].astype(jnp.int32)
  return jnp.take_along_axis(jax.nn.softmax(logits_te, axis=1), expert, axis=1), expert


def pack(expert_r, *, num_experts):
  """By a stable sort of rows and a second one for its inverse."""
  expert_r = jnp.minimum(expert_r, num_experts)
  order = jnp.argsort(expert_r, stable=True).astype(jnp.int32)
  sizes = jnp.bincount(expert_r, length=num_experts + 1).astype(jnp.int32)
  starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
  return order, jnp.argsort(order).astype(jnp.int32), starts
