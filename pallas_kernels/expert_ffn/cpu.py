"""`expert_ffn` for CPUs: a scan over experts, a loop over blocks of that expert's rows.

Rows are gathered from `x` inside the block and added to the result at their token, so that neither the
gathered rows nor the rows of the result exist in memory. A CPU adds them one after the other: the result
does not depend on the number of threads.
"""

import functools

import jax
import jax.numpy as jnp

from ..activations import hidden
from ..compat import zeros_like_varying
from ..packed import (
  add_rows,
  block_widths,
  iota,
  matmul_t,
  overrun,
  read,
  rows_of_block,
  t_matmul,
  take,
  walk,
  write,
)
from ..registry import accumulator


def saved_rows(num_rows, num_experts):
  """Rows that the pre-activations of `num_rows` take."""
  return num_rows + overrun(num_rows, num_experts)


def forward(x_td, token_r, weight_r, plan, into, w_down, *, activation, groups, save):
  """(`y [T, D]`, pre-activations `[1 or 2, save, F]` in packed order, or None where `save` is 0).

  Pre-activations are kept in the type of x; `save` is at least `saved_rows`.

  Rows are added in packed order whatever `groups` promises of theirs.
  """
  acc = accumulator(x_td, w_down)
  num_rows, num_experts = token_r.shape[0], w_down.shape[0]
  token_r, weight_r = take(token_r, plan.order), take(weight_r, plan.order).astype(acc)
  zeros = lambda *shape: zeros_like_varying(shape, acc, x_td)
  pre = None
  if save:
    pre = zeros_like_varying((len(into), save, w_down.shape[1]), x_td.dtype, x_td)

  def visit_expert(carry, scanned):
    start, end, into, w_down = scanned
    into, w_down = [w.astype(acc) for w in into], w_down.astype(acc)

    def visit_block(first, width, carry):
      y_td, pre = carry
      row_w, inside_w = rows_of_block(first, width, end)
      token_w = take(token_r, row_w)
      x_wd = take(x_td, token_w).astype(acc)
      pre_w = tuple(x_wd @ w for w in into)
      weight_w = jnp.where(inside_w, take(weight_r, row_w), 0)
      y_wd = (hidden(activation, pre_w) @ w_down) * weight_w[:, None]
      if save:
        for i, p_wf in enumerate(pre_w):
          at = (jnp.int32(i), first, jnp.int32(0))
          pre = jax.lax.dynamic_update_slice(pre, p_wf[None].astype(pre.dtype), at)
      return add_rows(y_td, token_w, y_wd), pre

    return walk(start, end, block_widths(num_rows, num_experts), visit_block, carry), None

  scanned = (plan.starts[:-1], plan.starts[1:], into, w_down)
  (y_td, pre), _ = jax.lax.scan(visit_expert, (zeros(*x_td.shape), pre), scanned)
  return y_td.astype(x_td.dtype), pre


def backward(x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups):
  """Gradients of `x`, `weight`, `into` and `w_down`; the activation is computed again from `pre`.

  The gradient of a row's weight is <dy, y_row> = <dy w_down^T, a_row>: y_row is not needed (SonicMoE,
  arXiv 2512.14080, section 3.2).
  """
  acc = accumulator(x_td, w_down)
  num_rows, num_experts = token_r.shape[0], w_down.shape[0]
  row_token, row_weight = take(token_r, plan.order), take(weight_r, plan.order).astype(acc)
  zeros = lambda *shape: zeros_like_varying(shape, acc, x_td)

  def visit_expert(carry, scanned):
    start, end, into_e, down_e = scanned
    into_e, down_e = [w.astype(acc) for w in into_e], down_e.astype(acc)

    def visit_block(first, width, carry):
      dx_td, dweight_r, dinto, ddown = carry
      row_w, inside_w = rows_of_block(first, width, end)
      token_w = take(row_token, row_w)
      weight_w = jnp.where(inside_w, take(row_weight, row_w), 0)[:, None]
      x_wd, dy_wd = take(x_td, token_w).astype(acc), take(dy_td, token_w).astype(acc)
      # Rows past the end hold what other experts saved.
      saved = [read(pre[i], first, width).astype(acc) for i in range(len(pre))]
      saved = [jnp.where(inside_w[:, None], p_wf, 0) for p_wf in saved]
      a_wf, pull = jax.vjp(lambda *pre_w: hidden(activation, pre_w), *saved)
      da_wf = matmul_t(dy_wd, down_e)
      dpre = pull(da_wf * weight_w)
      dx_wd = functools.reduce(jnp.add, map(matmul_t, dpre, into_e))
      dweight_r = write(dweight_r, jnp.sum(a_wf * da_wf, axis=1), first)
      dinto = [total + t_matmul(x_wd, d) for total, d in zip(dinto, dpre, strict=True)]
      ddown = ddown + t_matmul(a_wf * weight_w, dy_wd)
      return add_rows(dx_td, token_w, dx_wd), dweight_r, dinto, ddown

    start_dw = [zeros(*w.shape) for w in into_e], zeros(*down_e.shape)
    widths = block_widths(num_rows, num_experts)
    *carry, dinto, ddown = walk(start, end, widths, visit_block, (*carry, *start_dw))
    dw = tuple(d.astype(w.dtype) for d, w in zip(dinto, into, strict=True))
    return tuple(carry), (dw, ddown.astype(w_down.dtype))

  packed = num_rows + overrun(num_rows, num_experts)
  scanned = (plan.starts[:-1], plan.starts[1:], into, w_down)
  carry = (zeros(*x_td.shape), zeros(packed))
  (dx_td, dweight_r), (dinto, ddown) = jax.lax.scan(visit_expert, carry, scanned)
  kept = iota(num_rows) < plan.starts[-1]
  dweight_r = jnp.where(kept, dweight_r[:num_rows], 0).astype(weight_r.dtype)
  return dx_td.astype(x_td.dtype), take(dweight_r, plan.position), dinto, ddown
