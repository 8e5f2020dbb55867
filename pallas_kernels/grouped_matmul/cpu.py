"""`grouped_matmul` for CPUs: a scan over experts, a loop over blocks of that expert's rows."""

import jax
import jax.numpy as jnp

from ..compat import zeros_like_varying
from ..packed import (
  block_widths,
  iota,
  matmul_t,
  overrun,
  rows_of_block,
  t_matmul,
  take,
  walk,
  write,
)
from ..registry import accumulator


def forward(lhs_rd, rhs, starts, *, transpose_rhs):
  """`[R, F]`; `starts [E + 1]` are the first rows of the groups and the end of the last."""
  acc = accumulator(lhs_rd, rhs)
  num_rows, num_experts = lhs_rd.shape[0], rhs.shape[0]
  product = matmul_t if transpose_rhs else jnp.matmul

  def visit_expert(out_rf, scanned):
    start, end, matrix = scanned
    matrix = matrix.astype(acc)

    def visit_block(first, width, out_rf):
      row_w, _ = rows_of_block(first, width, end)
      out_wf = product(take(lhs_rd, row_w).astype(acc), matrix)
      return write(out_rf, out_wf.astype(out_rf.dtype), first)

    return walk(start, end, block_widths(num_rows, num_experts), visit_block, out_rf), None

  shape = (num_rows + overrun(num_rows, num_experts), rhs.shape[1 if transpose_rhs else 2])
  out_rf = zeros_like_varying(shape, lhs_rd.dtype, lhs_rd)
  out_rf, _ = jax.lax.scan(visit_expert, out_rf, (starts[:-1], starts[1:], rhs))
  kept = iota(num_rows) < starts[-1]
  return jnp.where(kept[:, None], out_rf[:num_rows], 0)


def backward(lhs_rd, rhs, starts, dout_rf, *, transpose_rhs):
  """Gradients of `lhs` and `rhs`."""
  acc = accumulator(lhs_rd, rhs)
  num_rows, num_experts = lhs_rd.shape[0], rhs.shape[0]

  def visit_expert(carry, scanned):
    start, end = scanned

    def visit_block(first, width, total):
      row_w, inside_w = rows_of_block(first, width, end)
      lhs_wd = take(lhs_rd, row_w).astype(acc)
      dout_wf = jnp.where(inside_w[:, None], take(dout_rf, row_w).astype(acc), 0)
      return total + (t_matmul(dout_wf, lhs_wd) if transpose_rhs else t_matmul(lhs_wd, dout_wf))

    total = zeros_like_varying(rhs.shape[1:], acc, lhs_rd)
    total = walk(start, end, block_widths(num_rows, num_experts), visit_block, total)
    return carry, total.astype(rhs.dtype)

  _, drhs = jax.lax.scan(visit_expert, None, (starts[:-1], starts[1:]))
  return forward(dout_rf, rhs, starts, transpose_rhs=not transpose_rhs), drhs
