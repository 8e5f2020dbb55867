"""Capacity: which rows an expert with a bounded buffer keeps, and in which order rows claim a place."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import pack

PRIORITIES = ('token_major', 'choice_major', 'score', 'random')


def capacity(num_tokens: int, num_experts: int, k: int, factor: float) -> int:
  """`C = ceil(factor * k * tokens / experts)`, at least 1 and at most `num_tokens`."""
  return min(num_tokens, max(1, math.ceil(factor * k * num_tokens / num_experts - 1e-9)))


def capacities(
  num_tokens: int, shares: tuple[float, ...], k: int, factor: float
) -> Int[Array, ' bins']:
  """`capacity` of experts of unlike shares, and of the bin that collects what is not wanted."""
  total = sum(shares)
  limits = [capacity(num_tokens, 1, k, factor * share / total) for share in shares]
  return jnp.asarray([*limits, 0], jnp.int32)


def rank_within(bin_r: Int[Array, ' R'], num_bins: int) -> Int[Array, ' R']:
  """How many earlier rows fall in the same bin (the same expert, say): no `[R, E]` cumulative sum, no argsort.

  A bin of index `num_bins` collects what is not wanted.
  """
  packing = pack(bin_r, num_bins)
  return packing.position - packing.starts[bin_r]


def keep_within_capacity(
  expert_tk: Int[Array, 'T K'],
  num_experts: int,
  limit: int | Array,
  priority: str,
  order_t: Float[Array, ' T'] | None = None,
) -> Bool[Array, 'T K']:
  """Which of the choices of one routing group find a place.

  Args:
    expert_tk: wanted experts, `num_experts` where nothing is wanted (padding).
    num_experts: E.
    limit: C, rows an expert keeps, or one number for each expert and the bin of what is not wanted.
    priority: who claims first. 'token_major': in order of position, all choices of a token before the next
      token (prefix-safe). 'choice_major': first choices of all tokens before any second choice (GShard,
      V-MoE). 'score': tokens in order of falling `order_t`, choice-major within (batch-prioritised
      routing, Riquelme et al. 2021, section 4.1). 'random': the same with a random `order_t`.
    order_t: priority of a token; the larger, the earlier.
  """
  num_tokens, k = expert_tk.shape
  limit_tk = limit if isinstance(limit, int) else limit[expert_tk]
  if priority == 'token_major':
    return rank_within(expert_tk.reshape(-1), num_experts).reshape(num_tokens, k) < limit_tk
  if order_t is None:
    permutation_t = jnp.arange(num_tokens)
  else:
    permutation_t = jnp.argsort(-order_t, stable=True)
  queue_kt = expert_tk[permutation_t].T
  rank_kt = rank_within(queue_kt.reshape(-1), num_experts).reshape(k, num_tokens)
  rank_tk = jnp.zeros((num_tokens, k), rank_kt.dtype)
  return rank_tk.at[permutation_t].set(rank_kt.T, unique_indices=True) < limit_tk


keep_within_capacity_by_group = jax.vmap(keep_within_capacity, in_axes=(0, None, None, None, 0))
"""`[G, T, K]` choices, `[G, T]` priorities (or None): every group has a buffer of its own."""
