"""`expert_ffn` for CPUs: products of several experts at once, for as long as most of them have rows (batches.py).

Rows are gathered from `x` for the experts at hand and added to the result at their tokens, so that neither all gathered
rows nor all rows of the result exist in memory. A CPU adds them one after the other: the result does not depend on the
number of threads.
"""

import functools

import jax
import jax.numpy as jnp

from ..activations import hidden
from ..batches import each_expert, rows_of
from ..compat import zeros_like_varying
from ..packed import add_rows, overrun, take
from ..registry import accumulator


def saved_rows(num_rows, num_experts):
  """Rows that the pre-activations of `num_rows` take."""
  return num_rows + overrun(num_rows, num_experts)


def forward(x_td, token_r, weight_r, plan, into, w_down, *, activation, groups, save):
  """(`y [T, D]`, pre-activations `[1 or 2, save, F]` in packed order, or None where `save` is 0).

  Pre-activations are kept in the type of x; `save` is at least `saved_rows`.

  Rows are added at their tokens whatever `groups` promises of them.
  """
  acc = accumulator(x_td, w_down)
  token_r, weight_r = take(token_r, plan.order), take(weight_r, plan.order).astype(acc)
  pre = None
  if save:
    pre = zeros_like_varying((len(into) * save, w_down.shape[1]), x_td.dtype, x_td)

  def visit(first_c, end_c, width, weights, carry):
    y_td, pre = carry
    *into, down = [w.astype(acc) for w in weights]
    rows = rows_of(first_c, end_c, width, token_r, weight_r)
    x_cwd = rows.of_tokens(x_td).astype(acc)
    pre_cwf = tuple(x_cwd @ w for w in into)
    y_cwd = hidden(activation, pre_cwf) @ down * rows.by_expert(rows.weight)[:, :, None]
    if save:
      for i, new in enumerate(pre_cwf):
        pre = rows.put(pre, new, i * save)
    return (add_rows(y_td, rows.token, y_cwd.reshape(-1, y_td.shape[1])), pre), ()

  y_td = zeros_like_varying(x_td.shape, acc, x_td)
  (y_td, pre), _ = each_expert(plan, token_r.shape[0], (*into, w_down), visit, (y_td, pre))
  return y_td.astype(x_td.dtype), pre.reshape(len(into), save, -1) if save else None


def backward(x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups):
  """Gradients of `x`, `weight`, `into` and `w_down`; the activation is computed again from `pre`.

  The gradient of a row's weight is <dy, y_row> = <dy w_down^T, a_row>: y_row is not needed (SonicMoE,
  arXiv 2512.14080, section 3.2).
  """
  acc = accumulator(x_td, w_down)
  num_rows = token_r.shape[0]
  row_token, row_weight = take(token_r, plan.order), take(weight_r, plan.order).astype(acc)
  zeros = lambda *shape: zeros_like_varying(shape, acc, x_td)
  flat = pre.reshape(-1, pre.shape[-1])

  def visit(first_c, end_c, width, weights, carry):
    dx_td, dweight_r = carry
    *into, down = [w.astype(acc) for w in weights]
    rows = rows_of(first_c, end_c, width, row_token, row_weight)
    weight_cw = rows.by_expert(rows.weight)[:, :, None]
    x_cwd, dy_cwd = (rows.of_tokens(x).astype(acc) for x in (x_td, dy_td))
    saved = [rows.of(flat, i * pre.shape[1]).astype(acc) for i in range(len(into))]
    a_cwf, pull = jax.vjp(lambda *pre_cwf: hidden(activation, pre_cwf), *saved)
    da_cwf = _matmul_t(dy_cwd, down)
    dx_cwd, dinto = _of_into(x_cwd, into, pull(da_cwf * weight_cw))
    dweight_r = rows.put(dweight_r, _row_dot(a_cwf, da_cwf))
    dx_td = add_rows(dx_td, rows.token, dx_cwd.reshape(-1, dx_td.shape[1]))
    return (dx_td, dweight_r), (*dinto, _t_matmul(a_cwf * weight_cw, dy_cwd))

  weights = (*into, w_down)
  none = lambda experts: tuple(zeros(experts, *w.shape[1:]) for w in weights)
  carry = zeros(*x_td.shape), zeros(saved_rows(num_rows, w_down.shape[0]))
  (dx_td, dweight_r), dw = each_expert(plan, num_rows, weights, visit, carry, none)
  *dinto, ddown = (d.astype(w.dtype) for d, w in zip(dw, weights, strict=True))
  dweight_r = take(dweight_r, plan.position).astype(weight_r.dtype)
  return dx_td.astype(x_td.dtype), dweight_r, tuple(dinto), ddown


def _of_into(x_cwd, into, dpre):
  """Gradients of x and of `into`, by those of `x @ w` for each w of it.

  With one expert's many rows one wide product takes less time than two; with few rows of several experts it gains less
  than it takes to join their weights.
  """
  if len(x_cwd) > 1:
    dx_cwd = functools.reduce(jnp.add, map(_matmul_t, dpre, into))
    return dx_cwd, [_t_matmul(x_cwd, d) for d in dpre]
  joined = jnp.concatenate(dpre, axis=2)
  dx_cwd = _matmul_t(joined, jnp.concatenate(into, axis=2))
  return dx_cwd, jnp.split(_t_matmul(x_cwd, joined), len(into), axis=2)


def _row_dot(a_cwf, b_cwf):
  """`[C, W]`; of one expert as a product with ones, which XLA runs faster on CPUs than a sum."""
  if len(a_cwf) > 1:
    return jnp.sum(a_cwf * b_cwf, axis=2)
  return ((a_cwf * b_cwf) @ jnp.ones((a_cwf.shape[2], 1), a_cwf.dtype))[:, :, 0]


def _matmul_t(a_cwf, b_cdf):
  """`a @ b^T` of each expert, without a transposed copy."""
  return jax.lax.dot_general(a_cwf, b_cdf, (((2,), (2,)), ((0,), (0,))))


def _t_matmul(a_cwd, b_cwf):
  """`a^T @ b` of each expert, without a transposed copy."""
  return jax.lax.dot_general(a_cwd, b_cwf, (((1,), (1,)), ((0,), (0,))))
