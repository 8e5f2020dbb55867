"""Padded blocks: packed rows laid out so that every block of one static width belongs to one expert.

The shape is static, so one batched matmul serves any backend. Each block reads its expert's weights, so
blocks are about as wide as half a mean group: at most 3 E of them, of which at most E are half empty.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from .packed import iota, take

Array = jax.Array


class Blocks(NamedTuple):
  """Blocks of `W` rows, `blocks` of them.

  Attributes:
    expert: int32 `[blocks]`, ascending; unused blocks name the last expert.
    row: int32 `[blocks, W]`, packed position of each row, clipped into range.
    inside: bool `[blocks, W]`, False for padding.
    slot: int32 `[R]`, place in the flattened blocks of each packed row; any place for rows past the last group.
  """

  expert: Array
  row: Array
  inside: Array
  slot: Array


def lay_out(starts: Array, num_rows: int) -> Blocks:
  """Blocks for packed rows whose groups begin at `starts` (`Plan.starts`)."""
  num_experts = starts.shape[0] - 1
  width = _width(num_rows, num_experts)
  used_e = (starts[1:] - starts[:-1] + width - 1) // width
  after_e = jnp.cumsum(used_e, dtype=jnp.int32)
  first_e = after_e - used_e

  block = iota(num_rows // width + num_experts)
  expert = jnp.minimum(_interval(after_e, block), num_experts - 1)
  begin = take(starts, expert) + (block - take(first_e, expert)) * width
  row = begin[:, None] + iota(width)[None, :]
  inside = row < take(starts, expert + 1)[:, None]

  packed_r = iota(num_rows)
  expert_r = jnp.minimum(_interval(starts[1:], packed_r), num_experts - 1)
  slot_r = take(first_e, expert_r) * width + packed_r - take(starts, expert_r)
  last = block.shape[0] * width - 1
  return Blocks(expert, jnp.minimum(row, num_rows - 1), inside, jnp.minimum(slot_r, last))


def _width(num_rows: int, num_experts: int) -> int:
  """A power of two of at least 8 rows, at most half a mean group."""
  width = 8
  while width * 4 * num_experts <= num_rows:
    width *= 2
  return width


def _interval(ends: Array, values: Array) -> Array:
  """Index of the half-open interval that each value lies in, given the intervals' ends."""
  return jnp.searchsorted(ends, values, side='right').astype(jnp.int32)


def into_blocks(x: Array, index: Array, blocks: Blocks) -> Array:
  """The rows `x[index]` in blocks `[blocks, W, ...]`, zero where padded."""
  inside = blocks.inside.reshape(blocks.inside.shape + (1,) * (x.ndim - 1))
  return jnp.where(inside, take(x, index), 0)


def from_blocks(values: Array, blocks: Blocks) -> Array:
  """Packed rows `[R, ...]` of values in blocks; unspecified for rows past the last group."""
  return take(values.reshape(-1, *values.shape[2:]), blocks.slot)


def matmul(a: Array, b: Array, contract: tuple[int, int], out_type) -> Array:
  """Per block: contracts axis `contract[0]` of `a` with axis `contract[1]` of `b`."""
  dimensions = (((contract[0],), (contract[1],)), ((0,), (0,)))
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=out_type)


def sum_by_expert(values: Array, blocks: Blocks, num_experts: int) -> Array:
  """`[E, ...]`: the sum of each expert's blocks; unused blocks must hold zeros."""
  return jax.ops.segment_sum(values, blocks.expert, num_experts, indices_are_sorted=True)
