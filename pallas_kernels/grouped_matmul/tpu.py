"""`grouped_matmul` for TPUs: see tpu_matmul.py."""

import jax
import jax.numpy as jnp

from .. import tpu_tiles
from ..registry import Unsupported
from ..tpu_matmul import Rows, matmul, sum_of_products
from ..visits import visit


def check(lhs_rd, rhs):
  """Refuses what the kernels do not compute.

  Raises:
    Unsupported: float16 or float64.
  """
  types = {str(x.dtype) for x in (lhs_rd, rhs)}
  if not types <= {'bfloat16', 'float32'}:
    raise Unsupported(
      f'grouped_matmul on TPU: lhs {lhs_rd.dtype}{lhs_rd.shape}, rhs {rhs.dtype}{rhs.shape}; '
      'bfloat16 and float32 are supported'
    )


def forward(lhs_rd, rhs, starts, *, transpose_rhs):
  """Same values as cpu.forward; rows past the last group are written as zeros by the kernel."""
  check(lhs_rd, rhs)
  num_rows, num_groups = lhs_rd.shape[0], rhs.shape[0]
  inner, columns = rhs.shape[1:][:: -1 if transpose_rhs else 1]
  tiles = tpu_tiles.for_rows(num_rows, num_groups, inner, columns, _itemsize(lhs_rd, rhs))
  visits = visit(starts, num_rows, tiles.rows, tail=True)
  out = Rows(jax.ShapeDtypeStruct((num_rows, columns), lhs_rd.dtype))
  options = dict(transpose_rhs=transpose_rhs, outs=[out], name='grouped_matmul')
  return matmul([Rows(lhs_rd)], [rhs], visits, tiles, **options)[0]


def backward(lhs_rd, rhs, starts, dout_rf, *, transpose_rhs):
  """Gradients of `lhs` and `rhs`."""
  check(lhs_rd, rhs)
  num_rows, num_groups = lhs_rd.shape[0], rhs.shape[0]
  left, right = (dout_rf, lhs_rd) if transpose_rhs else (lhs_rd, dout_rf)
  itemsize = _itemsize(left, right)
  tiles = tpu_tiles.for_groups(num_rows, num_groups, left.shape[1], right.shape[1], itemsize)
  visits = visit(starts, num_rows, tiles.rows, empty=True)
  options = dict(dtype=rhs.dtype, name='grouped_matmul_drhs')
  (drhs,) = sum_of_products(Rows(left), [Rows(right)], visits, tiles, **options)
  return forward(dout_rf, rhs, starts, transpose_rhs=not transpose_rhs), drhs


def _itemsize(*arrays):
  return max(jnp.dtype(x.dtype).itemsize for x in arrays)
