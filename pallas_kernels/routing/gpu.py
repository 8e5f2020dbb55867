"""Routing metadata for NVIDIA Hopper: a block of one warpgroup has 64 tokens, or 128 rows, in its registers.

As products of wgmma lie there, so that a row is spread over four neighbours of a warp: maxima and sums over columns
take two shuffles.
"""

import functools

import jax
import jax.numpy as jnp

from ..compat import struct_like, vary_like
from ..hopper import compat, target
from ..hopper.compat import pl, plgpu
from ..hopper.ring import transforms
from ..packed import iota, take
from ..registry import Unsupported
from . import blocks

# Tokens of a block, and experts of which their keys fill the registers without a spill.
TOKENS, MOST_TOP_K = 64, 256
# Rows of a block, each compared with all of them; experts counted at a time; experts from which counting them for each
# block is more work than a sort.
ROWS, COUNTED, MOST_PACKED = 128, 64, 1024
LEAST, MOST = -(2**31), 2**31 - 1
SIGN_KEPT = 0x7FFFFFFF


def top_k(logits_te, *, k):
  """Softmax and k rounds of maximum over a block of tokens; see the contract in `__init__`."""
  num_tokens, num_experts = logits_te.shape
  if logits_te.dtype == jnp.dtype('float64') or not num_tokens or num_experts > MOST_TOP_K:
    raise Unsupported(f'top_k on GPU: logits are {logits_te.dtype} {logits_te.shape}')
  tokens, width = pl.cdiv(num_tokens, TOKENS) * TOKENS, pl.cdiv(num_experts, 8) * 8
  padding = ((0, tokens - num_tokens), (0, width - num_experts))
  padded = jnp.pad(
    logits_te, padding, constant_values=-jnp.inf
  )  # the last of equals, and probable 0
  line = max(line for line in (8, 16, 32) if width % line == 0)
  kernel = compat.kernel(
    functools.partial(_top_k_kernel, k=k),
    out_type=[struct_like((k, tokens), kind, padded) for kind in (jnp.float32, jnp.int32)],
    scratch={
      'tile': plgpu.SMEM((TOKENS, width), jnp.float32, transforms=transforms(jnp.float32, line)),
      'best_prob': plgpu.SMEM((k, TOKENS), jnp.float32),
      'best': plgpu.SMEM((k, TOKENS), jnp.int32),
      'arrived': plgpu.Barrier(),
    },
    grid=tokens // TOKENS,
    name='top_k',
    approximate=False,
    warpgroups=1,
  )
  prob_kt, expert_kt = (vary_like(x, padded) for x in kernel(padded))
  return prob_kt.T[:num_tokens], expert_kt.T[:num_tokens]


def _top_k_kernel(logits_ref, prob_ref, expert_ref, *, tile, best_prob, best, arrived, k):
  tokens = pl.ds(jax.lax.axis_index('sm') * TOKENS, TOKENS)
  plgpu.copy_gmem_to_smem(logits_ref.at[tokens], tile, arrived)
  plgpu.barrier_wait(arrived)
  key, index = _sortable(tile[...]), jax.lax.broadcasted_iota(jnp.int32, tile.shape, 1)
  wide = lambda row: jax.lax.broadcast_in_dim(row, tile.shape, (0,))
  # Keys alone stay in registers: logits are made of them again, NaNs as NaN and zeros as +0.
  logits = _logit(key)
  most = jnp.max(logits, axis=1)
  total = jnp.sum(jnp.exp(logits - wide(most)), axis=1)

  def choose(j, key):
    first = jnp.max(key, axis=1)
    chosen = jnp.min(jnp.where(key == wide(first), index, MOST), axis=1)
    best_prob[j] = jnp.exp(_logit(first) - most) / total
    best[j] = chosen
    return jnp.where(index == wide(chosen), LEAST, key)

  jax.lax.fori_loop(jnp.int32(0), jnp.int32(k), choose, key)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(best_prob, prob_ref.at[:, tokens])
  plgpu.copy_smem_to_gmem(best, expert_ref.at[:, tokens])
  plgpu.wait_smem_to_gmem(0)


def _sortable(x):
  """int32 above LEAST in the order of the float32 `x`: zeros equal, NaN above all."""
  bits = jnp.where(x == 0, 0, jax.lax.bitcast_convert_type(x, jnp.int32))
  ordered = jnp.where(bits < 0, bits ^ SIGN_KEPT, bits)
  return jnp.where(jnp.isnan(x), MOST, ordered)


def _logit(key):
  """The inverse of `_sortable`."""
  bits = jnp.where(key < 0, key ^ SIGN_KEPT, key)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def pack(expert_r, *, num_experts):
  """Ranks in blocks of rows and counts of each block by one kernel; counts of earlier blocks by XLA.

  Dropped rows are what the counts leave.
  """
  num_rows = expert_r.shape[0]
  if not num_rows or num_experts > MOST_PACKED:
    raise Unsupported(f'pack on GPU: {num_rows} rows of {num_experts} experts')
  steps = pl.cdiv(num_rows, ROWS)
  expert_r = jnp.minimum(expert_r, num_experts)
  padded = jnp.pad(expert_r, (0, steps * ROWS - num_rows), constant_values=num_experts)
  rank, counts = _ranks(padded, steps, pl.cdiv(num_experts, COUNTED))
  counts = counts.reshape(steps, -1)[:, :num_experts]
  before = jnp.cumsum(counts, axis=0, dtype=jnp.int32) - counts
  dropped = iota(steps) * ROWS - jnp.sum(before, axis=1, dtype=jnp.int32)
  sizes = before[-1] + counts[-1]
  sizes = jnp.append(sizes, num_rows - jnp.sum(sizes, dtype=jnp.int32))
  before = jnp.concatenate([before, dropped[:, None]], axis=1)
  before_r = take(before.reshape(-1), iota(num_rows) // ROWS * (num_experts + 1) + expert_r)
  return blocks.ranked(expert_r, rank[:num_rows] + before_r, sizes)


def _ranks(padded, steps, parts):
  """Of each row the equal ones before it in its block `[steps * ROWS]`, and counts `[steps, parts, COUNTED]`."""
  kernel = compat.kernel(
    _rank_kernel,
    out_type=[
      struct_like((steps * ROWS,), jnp.int32, padded),
      struct_like((steps, parts, COUNTED), jnp.int32, padded),
    ],
    scratch={
      'expert': plgpu.SMEM((ROWS,), jnp.int32),
      'rank': plgpu.SMEM((ROWS,), jnp.int32),
      'counts': plgpu.SMEM((parts, COUNTED), jnp.int32),
      'arrived': plgpu.Barrier(),
    },
    grid=steps,
    name='rank',
    approximate=False,
    warpgroups=1,
  )
  return [vary_like(x, padded) for x in kernel(padded)]


def _rank_kernel(expert_ref, rank_ref, counts_ref, *, expert, rank, counts, arrived):
  block = jax.lax.axis_index('sm')
  rows = pl.ds(block * ROWS, ROWS)
  plgpu.copy_gmem_to_smem(expert_ref.at[rows], expert, arrived)
  plgpu.barrier_wait(arrived)
  shape = (COUNTED, ROWS)
  index, other = (_placed(jax.lax.broadcasted_iota(jnp.int32, shape, axis)) for axis in (0, 1))
  theirs = _wide(expert[...], shape, 1)

  def compare(i, carry):
    part = pl.ds(i * COUNTED, COUNTED)
    same = _wide(expert[part], shape, 0) == theirs
    rank[part] = _count(same & (other < index + i * COUNTED))
    return carry

  def count(i, carry):
    counts[i] = _count(index + i * COUNTED == theirs)
    return carry

  jax.lax.fori_loop(jnp.int32(0), jnp.int32(ROWS // COUNTED), compare, jnp.int32(0))
  jax.lax.fori_loop(jnp.int32(0), jnp.int32(counts.shape[0]), count, jnp.int32(0))
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(rank, rank_ref.at[rows])
  plgpu.copy_smem_to_gmem(counts, counts_ref.at[block])
  plgpu.wait_smem_to_gmem(0)


def _count(held):
  """How many of each row's columns hold."""
  ones = jnp.where(held, jnp.int32(1), jnp.int32(0))
  return _placed(jnp.sum(ones, axis=1, dtype=jnp.int32), without=1)


def _wide(values, shape, axis):
  """`values` along `axis` of a matrix."""
  values = _placed(values, without=1 - axis)
  return _placed(jax.lax.broadcast_in_dim(values, shape, (axis,)))


def _placed(x, without=None):
  """`x` where wgmma would leave it, or such a matrix without one axis: left to itself, the compiler finds no place."""
  if not target.current().places:
    return x
  layout = plgpu.Layout.WGMMA
  return plgpu.layout_cast(x, layout if without is None else layout.reduce(without))
