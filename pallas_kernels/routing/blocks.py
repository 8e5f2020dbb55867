"""Routing metadata on any backend: XLA's top_k, and one sort of the rows."""

import jax
import jax.numpy as jnp

from ..packed import iota, take


def top_k(logits_te, *, k):
  """`(prob [T, K], expert [T, K])`; see the contract in `__init__`."""
  # XLA orders NaNs by their sign, and tells -0 from 0.
  key = jnp.where(jnp.isnan(logits_te), jnp.nan, jnp.where(logits_te == 0, 0, logits_te))
  expert = jax.lax.top_k(key, k)[1].astype(jnp.int32)
  return jnp.take_along_axis(jax.nn.softmax(logits_te, axis=1), expert, axis=1), expert


def pack(expert_r, *, num_experts):
  """`(order [R], position [R], starts [E + 1])`.

  One sort of `expert * R + row` takes less time than a stable argsort on a CPU.
  """
  num_rows = expert_r.shape[0]
  expert_r = jnp.minimum(expert_r, num_experts)
  if (num_experts + 1) * num_rows < 2**31:
    key_r = jnp.sort(expert_r * num_rows + iota(num_rows))
    order, sorted_r, first_e = key_r % num_rows, key_r, iota(num_experts + 1) * num_rows
  else:
    order = jnp.argsort(expert_r, stable=True).astype(jnp.int32)
    sorted_r, first_e = take(expert_r, order), iota(num_experts + 1)
  starts = jnp.searchsorted(sorted_r, first_e).astype(jnp.int32)
  return order, inverse(order), starts


def inverse(permutation_r):
  """Where each value of a permutation stands."""
  rows = iota(permutation_r.shape[0])
  empty = jnp.zeros_like(permutation_r)
  return empty.at[permutation_r].set(rows, unique_indices=True, mode='promise_in_bounds')


def ranked(expert_r, rank_r, sizes):
  """The result of `pack` from each row's rank in its expert, and the sizes `[E + 1]`."""
  starts = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
  position = rank_r + take(starts, expert_r)
  return inverse(position), position, starts
