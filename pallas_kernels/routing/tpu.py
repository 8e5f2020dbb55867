"""Routing metadata for TPUs: experts on one axis of the registers, tokens or rows on the other."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import struct_like
from ..registry import Unsupported
from . import blocks

MOST_EXPERTS, MOST_ROWS = 1024, 2**24
TOKENS, ROWS = 256, 256
LEAST = -(2**31)


def top_k(logits_te, *, k):
  """Softmax and k rounds of maximum over a block of tokens; see the contract in `__init__`."""
  num_tokens, num_experts = logits_te.shape
  if logits_te.dtype == jnp.dtype('float64') or num_experts > MOST_EXPERTS:
    raise Unsupported(f'top_k on TPU: logits are {logits_te.dtype} {logits_te.shape}')
  rows = min(TOKENS, num_tokens)
  spec = lambda width: pl.BlockSpec((rows, width), lambda i: (i, 0))
  return pl.pallas_call(
    functools.partial(_top_k_kernel, k=k),
    grid=(pl.cdiv(num_tokens, rows),),
    in_specs=[spec(num_experts)],
    out_specs=[spec(k), spec(k)],
    out_shape=[
      struct_like((num_tokens, k), jnp.float32, logits_te),
      struct_like((num_tokens, k), jnp.int32, logits_te),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    name='top_k',
  )(logits_te)


def _top_k_kernel(logits_ref, prob_ref, expert_ref, *, k):
  logits = logits_ref[...]
  shifted = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
  prob = shifted / jnp.sum(shifted, axis=1, keepdims=True)
  key, index = _sortable(logits), jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  column = jax.lax.broadcasted_iota(jnp.int32, prob_ref.shape, 1)
  best_prob = jnp.zeros(prob_ref.shape, jnp.float32)
  best = jnp.zeros(expert_ref.shape, jnp.int32)
  for j in range(k):
    most = jnp.max(key, axis=1, keepdims=True)
    chosen = jnp.min(jnp.where(key == most, index, logits.shape[1]), axis=1, keepdims=True)
    is_chosen = index == chosen
    value = jnp.sum(jnp.where(is_chosen, prob, 0), axis=1, keepdims=True)
    best_prob = jnp.where(column == j, value, best_prob)
    best = jnp.where(column == j, chosen, best)
    key = jnp.where(is_chosen, LEAST, key)
  prob_ref[...] = best_prob
  expert_ref[...] = best


def _sortable(x):
  """int32 above LEAST in the order of the float32 `x`: zeros equal, NaN above all."""
  bits = pltpu.bitcast(jnp.where(x == 0, 0.0, x), jnp.int32)
  ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
  return jnp.where(jnp.isnan(x), 0x7FFFFFFF, ordered)


def pack(expert_r, *, num_experts):
  """Ranks by a matmul with a triangle of ones; the counts so far stay on the chip from block to block."""
  num_rows = expert_r.shape[0]
  if num_rows > MOST_ROWS or num_experts > MOST_EXPERTS:
    raise Unsupported(f'pack on TPU: {num_rows} rows of {num_experts} experts')
  expert_r = jnp.minimum(expert_r, num_experts)
  steps, classes = pl.cdiv(num_rows, ROWS), num_experts + 1
  padded = jnp.pad(expert_r, (0, steps * ROWS - num_rows), constant_values=classes)
  row = pl.BlockSpec((1, 1, ROWS), lambda i: (i, 0, 0))
  rank, sizes = pl.pallas_call(
    _rank_kernel,
    grid=(steps,),
    in_specs=[row],
    out_specs=[row, pl.BlockSpec((classes, 1), lambda i: (0, 0))],
    out_shape=[
      struct_like((steps, 1, ROWS), jnp.int32, expert_r),
      struct_like((classes, 1), jnp.float32, expert_r),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('arbitrary',)),
    name='rank',
  )(padded.reshape(steps, 1, ROWS))
  return blocks.ranked(expert_r, rank.reshape(-1)[:num_rows], sizes[:, 0].astype(jnp.int32))


def _rank_kernel(expert_ref, rank_ref, sizes_ref):
  """`sizes [E + 1, 1]` holds the counts of the blocks before; float32 counts are exact below 2^24."""

  @pl.when(pl.program_id(0) == 0)
  def _():
    sizes_ref[...] = jnp.zeros_like(sizes_ref)

  classes = sizes_ref.shape[0]
  kind = jax.lax.broadcasted_iota(jnp.int32, (classes, ROWS), 0)
  mine = kind == expert_ref[0]
  i, j = (jax.lax.broadcasted_iota(jnp.int32, (ROWS, ROWS), axis) for axis in (0, 1))
  ones, triangle = mine.astype(jnp.bfloat16), (i < j).astype(jnp.bfloat16)
  earlier = jax.lax.dot(ones, triangle, preferred_element_type=jnp.float32)
  rank = jnp.sum(jnp.where(mine, earlier + sizes_ref[...], 0), axis=0, keepdims=True)
  rank_ref[0] = rank.astype(jnp.int32)
  sizes_ref[...] += jnp.sum(mine.astype(jnp.float32), axis=1, keepdims=True)
