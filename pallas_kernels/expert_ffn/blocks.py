"""`expert_ffn` on any backend: padded blocks and batched matmuls.

Costs up to 1.5 times the necessary matmul work, and a copy of the expert's weights (and in the backward a
weight gradient) for each of at most 3 E blocks.
"""

import functools

import jax
import jax.numpy as jnp

from .. import padded
from ..activations import hidden
from ..packed import iota, take
from ..registry import accumulator


def saved_rows(num_rows, num_experts):
  """See cpu.saved_rows."""
  return num_rows


def forward(x_td, token_r, weight_r, plan, into, w_down, *, activation, groups, save):
  """Same values as cpu.forward."""
  acc = accumulator(x_td, w_down)
  num_rows = token_r.shape[0]
  blocks = padded.lay_out(plan.starts, num_rows)
  row = take(plan.order, blocks.row)
  x = padded.into_blocks(x_td, take(token_r, row), blocks)
  pre = tuple(padded.matmul(x, _of(w, blocks, x_td), (2, 1), acc) for w in into)
  a = hidden(activation, pre).astype(x_td.dtype)
  y = padded.matmul(a, _of(w_down, blocks, x_td), (2, 1), acc)
  y = y * padded.into_blocks(weight_r.astype(acc), row, blocks)[:, :, None]
  y_td = _combine(y, token_r, plan, blocks, x_td.shape[0], groups).astype(x_td.dtype)
  if not save:
    return y_td, None
  narrow = [p.astype(x_td.dtype) for p in pre]
  packed = jnp.stack([padded.from_blocks(p, blocks) for p in narrow])  # [1 or 2, R, F]
  return y_td, jnp.pad(packed, ((0, 0), (0, save - num_rows), (0, 0)))


def backward(x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups):
  """Same values as cpu.backward."""
  acc = accumulator(x_td, w_down)
  num_rows, num_experts = token_r.shape[0], w_down.shape[0]
  blocks = padded.lay_out(plan.starts, num_rows)
  row = take(plan.order, blocks.row)
  token = take(token_r, row)
  narrow = lambda values: values.astype(x_td.dtype)
  weight = padded.into_blocks(weight_r.astype(acc), row, blocks)[:, :, None]
  x, dy = padded.into_blocks(x_td, token, blocks), padded.into_blocks(dy_td, token, blocks)
  saved = tuple(padded.into_blocks(p, blocks.row, blocks).astype(acc) for p in pre)
  a, pull = jax.vjp(functools.partial(_hidden, activation), saved)
  da = padded.matmul(dy, _of(w_down, blocks, x_td), (2, 2), acc)
  (dpre,) = pull(da * weight)

  dx = sum(
    padded.matmul(narrow(d), _of(w, blocks, x_td), (2, 2), acc)
    for d, w in zip(dpre, into, strict=True)
  )
  dx_td = _combine(dx, token_r, plan, blocks, x_td.shape[0], groups).astype(x_td.dtype)
  dweight_r = padded.from_blocks(jnp.sum(a * da, axis=2), blocks)
  dweight_r = jnp.where(iota(num_rows) < plan.starts[-1], dweight_r, 0)
  dweight_r = take(dweight_r, plan.position).astype(weight_r.dtype)

  total = lambda a, b: padded.sum_by_expert(padded.matmul(a, b, (1, 1), acc), blocks, num_experts)
  dinto = tuple(total(x, narrow(d)).astype(w.dtype) for d, w in zip(dpre, into, strict=True))
  ddown = total(narrow(a * weight), dy).astype(w_down.dtype)
  return dx_td, dweight_r, dinto, ddown


def _hidden(activation, pre):
  return hidden(activation, pre)


def _of(w, blocks, x):
  """The weights of each block's expert, in the type of the rows."""
  return take(w, blocks.expert).astype(x.dtype)


def _combine(y, token_r, plan, blocks, num_tokens, groups):
  """Adds the rows of each token: `[blocks, W, D] -> [T, D]`."""
  kept = iota(token_r.shape[0]) < plan.starts[-1]
  y_rd = jnp.where(kept[:, None], padded.from_blocks(y, blocks), 0)
  if groups == num_tokens:  # token-major rows: a gather, whose sum has a fixed order everywhere
    y_rd = take(y_rd, plan.position)
    return y_rd.reshape(num_tokens, -1, y_rd.shape[1]).sum(axis=1)  # [T, K, D] -> [T, D]
  return jnp.zeros((num_tokens, y_rd.shape[1]), y_rd.dtype).at[take(token_r, plan.order)].add(y_rd)
