"""Routing metadata for CPUs: counts within blocks of rows, then over blocks; a sort for many experts."""

import jax.numpy as jnp

from ..packed import iota
from . import blocks

# Each row is compared with the rows of its block, and each block has a count for each expert.
WIDTH = 32
# Among 8192 rows counts were clearly faster than the sort with 16 and 64 experts, a little with 128, and not with 256
# or more: experiments/results/bench_kernels/pack.json.
MOST_COUNTED = 128

top_k = blocks.top_k


def pack(expert_r, *, num_experts):
  """`(order [R], position [R], starts [E + 1])`."""
  chosen = count if num_experts <= MOST_COUNTED else blocks.pack
  return chosen(expert_r, num_experts=num_experts)


def count(expert_r, *, num_experts):
  """The same without a sort: R * WIDTH comparisons and E * R / WIDTH counts."""
  num_rows = expert_r.shape[0]
  groups = -(-num_rows // WIDTH)
  expert_r = jnp.minimum(expert_r, num_experts)
  filled = jnp.pad(expert_r, (0, groups * WIDTH - num_rows), constant_values=num_experts)
  expert = filled.reshape(groups, WIDTH)
  earlier = jnp.tril(jnp.ones((WIDTH, WIDTH), bool), -1)[None]
  same = (expert[:, :, None] == expert[:, None, :]) & earlier
  counts = jnp.zeros((groups, num_experts + 1), jnp.int32).at[iota(groups)[:, None], expert].add(1)
  before = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
  rank = jnp.sum(same, axis=2, dtype=jnp.int32) + jnp.take_along_axis(before, expert, axis=1)
  return blocks.ranked(expert_r, rank.reshape(-1)[:num_rows], before[-1] + counts[-1])
