"""`expert_ffn` for NVIDIA Hopper, built of five kernels (SonicMoE, arXiv 2512.14080, section 3, without its scatter).

Forward: rows gathered into the projection up, with the activation in its epilogue; down to packed rows; a gather and
weighted sum. Saved beside x are the pre-activations only, in the type of x. Backward: the gradient of the hidden
layer with the activation's slope, the weights' gradients and the hidden layer again in its epilogue; the gradient of
the rows, then their sum; the two gradients of weights.
"""

import jax.numpy as jnp

from ..hopper import depth, rows, tiles
from ..hopper.epilogues import Hidden, HiddenGradient, Store
from ..hopper.layout import Layout, collect, lay_out, padded_rows, spread
from ..packed import take
from .composed import combine


def saved_rows(num_rows, num_experts):
  """See cpu.saved_rows."""
  return padded_rows(num_rows, num_experts, tiles.rows_per_tile(num_rows, num_experts))


def check(x_td, into, w_down):
  """Refuses what the kernels do not compute.

  Raises:
    Unsupported: types other than one 16-bit type (w may be float32), widths that are no multiples of 128.
  """
  tiles.check_types('expert_ffn', x_td, w_gate=into[0], w_up=into[-1], w_down=w_down)
  tiles.check_widths('expert_ffn', d_model=x_td.shape[1], d_ff=w_down.shape[1])


def forward(x_td, token_r, weight_r, plan, into, w_down, *, activation, groups, save, gather=True):
  """(`y [T, D]`, pre-activations `[1 or 2, save, F]` or None where `save` is 0).

  The pre-activations lie as `[save, 1 or 2 x F]`, rows in the padded layout: the shape is what other bodies have.

  `gather`: the kernels fetch rows of x and dy themselves, instead of reading copies that XLA makes.

  Raises:
    Unsupported: see `check`.
  """
  check(x_td, into, w_down)
  layout, token_p, _ = _rows(token_r, plan, w_down)
  into, w_down = [w.astype(x_td.dtype) for w in into], w_down.astype(x_td.dtype)
  x, indexed = _operand(x_td, token_p, gather)
  width = w_down.shape[1]

  up = Hidden(width, x_td.dtype, activation, len(into), save)
  shape = tiles.choose(layout.tile, len(into) * width, sides=len(into))
  hidden, *pre = rows.run('expert_ffn_up', x, into, layout, shape, up, **indexed)
  shape = tiles.choose(layout.tile, x_td.shape[1])
  down = Store(x_td.shape[1], x_td.dtype)
  (y_pd,) = rows.run('expert_ffn_down', hidden, (w_down,), layout, shape, down)
  place_r = take(layout.slot, plan.position)
  y_td = combine(y_pd, place_r, token_r, weight_r, plan, x_td, groups)
  return y_td, pre[0].reshape(len(into), save, width) if save else None


def backward(
  x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups, gather=True
):
  """Same values as cpu.backward, to the precision of the type of x."""
  check(x_td, into, w_down)
  pre = pre.reshape(pre.shape[1], -1)
  layout, token_p, row_p = _rows(token_r, plan, w_down)
  narrow = [w.astype(x_td.dtype) for w in into]
  weight_p = spread(weight_r.astype(jnp.float32), row_p)
  x, x_indexed = _operand(x_td, token_p, gather)
  dy, dy_indexed = _operand(dy_td, token_p, gather)
  width, sides = w_down.shape[1], len(into)

  gradient = HiddenGradient(width, x_td.dtype, activation, sides, pre, weight_p)
  shape = tiles.choose(layout.tile, width, epilogue_buffers=sides)
  down, options = (w_down.astype(x_td.dtype),), dict(transposed=True, **dy_indexed)
  dpre, hidden, sums = rows.run('expert_ffn_dh', dy, down, layout, shape, gradient, **options)
  dweight_r = collect(jnp.sum(sums, axis=0), layout, plan.starts[-1])
  dweight_r = take(dweight_r, plan.position).astype(weight_r.dtype)

  shape = tiles.choose(layout.tile, x_td.shape[1])
  options = dict(transposed=True, summed=True)
  out = Store(x_td.shape[1], x_td.dtype)
  (dx_pd,) = rows.run('expert_ffn_dx', dpre, narrow, layout, shape, out, **options)
  place_r = take(layout.slot, plan.position)
  dx_td = combine(dx_pd, place_r, token_r, None, plan, x_td, groups)

  gathered = lambda side, indexed: dict(gathered=side, **indexed) if gather else {}
  results, options = (sides, jnp.dtype(into[0].dtype)), gathered('left', x_indexed)
  dinto = depth.run('expert_ffn_dw_into', x, dpre, layout, results, **options)
  results, options = (1, jnp.dtype(w_down.dtype)), gathered('right', dy_indexed)
  (ddown,) = depth.run('expert_ffn_dw_down', hidden, dy, layout, results, **options)
  dinto = tuple(d.astype(w.dtype) for d, w in zip(dinto, into, strict=True))
  return dx_td, dweight_r, dinto, ddown


def _rows(token_r, plan, w_down) -> tuple[Layout, jnp.ndarray, jnp.ndarray]:
  """The padded layout; of each padded row the token, and the row of the assignment, -1 for padding."""
  num_rows, num_experts = token_r.shape[0], w_down.shape[0]
  layout = lay_out(plan.starts, num_rows, tiles.rows_per_tile(num_rows, num_experts))
  row_p = jnp.where(layout.row < 0, -1, take(plan.order, jnp.maximum(layout.row, 0)))
  token_p = jnp.where(row_p < 0, -1, take(token_r, jnp.maximum(row_p, 0)))
  return layout, token_p, row_p


def _operand(values, token_p, gather):
  """What a kernel reads, and how it finds the rows."""
  return (values, {'index': token_p}) if gather else (spread(values, token_p), {})
