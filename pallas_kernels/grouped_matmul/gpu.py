"""`grouped_matmul` for NVIDIA Hopper: persistent, warp-specialised kernels over tiles of one expert's rows each."""

import jax.numpy as jnp

from ..hopper import depth, rows, tiles
from ..hopper.epilogues import Store
from ..hopper.layout import collect, lay_out, spread


def forward(lhs_rd, rhs, starts, *, transpose_rhs, gather=True):
  """Same values as cpu.forward.

  `gather`: the kernel fetches the rows itself, instead of reading a padded copy of lhs that XLA makes.

  Raises:
    Unsupported: types other than one 16-bit type (rhs may be float32), widths that are no multiples of 128.
  """
  _check(lhs_rd, rhs)
  layout = _lay_out(lhs_rd, rhs, starts)
  width = rhs.shape[1 if transpose_rhs else 2]
  shape = tiles.choose(layout.tile, width)
  out = Store(width, lhs_rd.dtype)
  matrices, options = (rhs.astype(lhs_rd.dtype),), dict(transposed=transpose_rhs)
  if gather:
    options['index'] = layout.row
  else:
    lhs_rd = spread(lhs_rd, layout.row)
  (out_pf,) = rows.run('grouped_matmul', lhs_rd, matrices, layout, shape, out, **options)
  return collect(out_pf, layout, starts[-1])


def backward(lhs_rd, rhs, starts, dout_rf, *, transpose_rhs, gather=True):
  """Gradients of `lhs` and `rhs`; the latter is summed in float32 and rounded once."""
  _check(lhs_rd, rhs)
  layout = _lay_out(lhs_rd, rhs, starts)
  left, right = (dout_rf, lhs_rd) if transpose_rhs else (lhs_rd, dout_rf)
  options = dict(gathered='left', index=layout.row) if gather else {}
  left = left if gather else spread(left, layout.row)
  right = spread(right, layout.row)
  results = (1, jnp.dtype(rhs.dtype))
  (drhs,) = depth.run('grouped_matmul_drhs', left, right, layout, results, **options)
  dlhs = forward(dout_rf, rhs, starts, transpose_rhs=not transpose_rhs, gather=gather)
  return dlhs, drhs


def _lay_out(lhs_rd, rhs, starts):
  num_rows, num_experts = lhs_rd.shape[0], rhs.shape[0]
  return lay_out(starts, num_rows, tiles.rows_per_tile(num_rows, num_experts))


def _check(lhs_rd, rhs):
  tiles.check_types('grouped_matmul', lhs_rd, rhs=rhs)
  tiles.check_widths(
    'grouped_matmul', **{'rhs.shape[1]': rhs.shape[1], 'rhs.shape[2]': rhs.shape[2]}
  )
