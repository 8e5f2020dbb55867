"""`expert_ffn` for TPUs: gathers by XLA, matmuls with the activation or its derivative in their epilogue.

Between forward and backward only x and the pre-activations are kept. The backward gathers the rows of x and dy
anew, and the derivative's kernel gives all that the three gradients of the weights and that of x read (SonicMoE,
arXiv 2512.14080, section 3).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import tpu_tiles
from ..activations import hidden
from ..packed import iota, take
from ..registry import Unsupported
from ..tpu_matmul import Product, Rows, matmul, sum_of_products
from ..tpu_tiles import Tiles
from ..visits import visit

F32 = jnp.float32


def saved_rows(num_rows, num_experts):
  """See cpu.saved_rows."""
  return num_rows


class _Tiles(NamedTuple):
  """Tiles of each kernel."""

  up: Tiles
  down: Tiles
  dhidden: Tiles
  dx: Tiles
  dup: Tiles
  ddown: Tiles


def check(x_td, num_rows, into, w_down, save=True) -> _Tiles:
  """The tiles, or a refusal of what the kernels do not compute.

  Raises:
    Unsupported: float16 or float64, or widths of which no tile fits.
  """
  types = {str(x.dtype) for x in (x_td, *into, w_down)}
  if not types <= {'bfloat16', 'float32'}:
    raise Unsupported(
      f'expert_ffn on TPU: x {x_td.dtype}{x_td.shape}, w_down {w_down.dtype}{w_down.shape}; '
      'bfloat16 and float32 are supported'
    )
  (num_experts, d_ff, d_model), count = w_down.shape, len(into)
  for_rows = functools.partial(tpu_tiles.for_rows, num_rows, num_experts)
  for_groups = functools.partial(tpu_tiles.for_groups, num_rows, num_experts)
  size, wide, narrow = _itemsize(x_td, *into, w_down), _itemsize(x_td, *into), _itemsize(x_td)
  return _Tiles(
    for_rows(d_model, d_ff, size, rhs=count, sums=count, outs=count * bool(save) + 1),
    for_rows(d_ff, d_model, size),
    for_rows(d_model, d_ff, _itemsize(x_td, w_down), outs=2 * count + 1),
    for_rows(d_ff, d_model, wide, lhs=count, rhs=count),
    for_groups(d_model, d_ff, narrow, rhs=count),
    for_groups(d_ff, d_model, narrow),
  )


def forward(x_td, token_r, weight_r, plan, into, w_down, *, activation, groups, save):
  """Same values as cpu.forward."""
  (_, d_ff, d_model), num_rows, count = w_down.shape, token_r.shape[0], len(into)
  tiles = check(x_td, num_rows, into, w_down, save)

  x_rd = take(x_td, take(token_r, plan.order))
  pre = (count, save, d_ff)
  outs = [_type((num_rows, d_ff), x_td), *([_type(pre, x_td)] if save else [])]

  def activate(sums, extras):
    return [hidden(activation, tuple(sums)), *([tuple(sums)] if save else [])]

  a_rf, *saved = matmul(
    [Rows(x_rd)],
    into,
    visit(plan.starts, num_rows, tiles.up.rows),
    tiles.up,
    products=[Product(0, i, i) for i in range(count)],
    outs=outs,
    epilogue=activate,
    name='expert_ffn_up',
  )
  visits, out = visit(plan.starts, num_rows, tiles.down.rows), _type((num_rows, d_model), x_td)
  (y_rd,) = matmul([Rows(a_rf)], [w_down], visits, tiles.down, outs=[out], name='expert_ffn_down')
  y_td = _combine(y_rd, token_r, weight_r, plan, x_td, groups)
  return y_td, saved[0] if save else None


def backward(x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups):
  """Same values as cpu.backward."""
  num_rows = token_r.shape[0]
  tiles = check(x_td, num_rows, into, w_down)
  row_token = take(token_r, plan.order)
  x_rd, dy_rd = take(x_td, row_token), take(dy_td, row_token)
  weight = jnp.where(iota(num_rows) < plan.starts[-1], take(weight_r, plan.order), 0)
  dpre, a_rf, dweight = _hidden_gradient(
    dy_rd, weight, plan, w_down, pre, activation, tiles.dhidden
  )

  dx_rd = _input_gradient(dpre, plan, into, x_td, tiles.dx)
  dx_td = _combine(dx_rd, token_r, None, plan, x_td, groups)
  dweight_r = jnp.where(iota(num_rows) < plan.starts[-1], dweight, 0)
  dweight_r = take(dweight_r, plan.position).astype(weight_r.dtype)

  rights = [Rows(dpre, i) for i in range(len(into))]
  dinto = _sums(plan, x_rd, rights, tiles.dup, dtype=into[0].dtype, name='expert_ffn_dup')
  options = dict(dtype=w_down.dtype, name='expert_ffn_ddown')
  (ddown,) = _sums(plan, a_rf, [Rows(dy_rd)], tiles.ddown, **options)
  return dx_td, dweight_r, tuple(dinto), ddown


def _hidden_gradient(dy_rd, weight_r, plan, w_down, pre, activation, tiles):
  """(dpre `[1 or 2, R, F]`, weight * a `[R, F]`, <a, dy w_down^T> `[R]`), all in packed order."""
  num_rows, d_ff, count = dy_rd.shape[0], w_down.shape[1], pre.shape[0]

  def differentiate(sums, extras):
    (da_wf,), (pre_wf, weight_w) = sums, extras
    a_wf, pull = jax.vjp(lambda p: hidden(activation, p), tuple(p.astype(F32) for p in pre_wf))
    weight_w1 = _as_column(weight_w)
    (dpre_wf,) = pull(da_wf * weight_w1)
    return [dpre_wf, a_wf * weight_w1, _sum_of_columns(a_wf * da_wf)]

  dpre, a_rf, partial = matmul(
    [Rows(dy_rd)],
    [w_down],
    visit(plan.starts, num_rows, tiles.rows),
    tiles,
    transpose_rhs=True,
    extras=[Rows(pre), Rows(weight_r.astype(F32)[None, :], lanes=True)],
    outs=[
      _type((count, num_rows, d_ff), dy_rd),
      _type((num_rows, d_ff), dy_rd),
      Rows(jax.ShapeDtypeStruct((d_ff // tiles.columns, 1, num_rows), F32), lanes=True),
    ],
    epilogue=differentiate,
    name='expert_ffn_dhidden',
  )
  return dpre, a_rf, jnp.sum(partial, axis=(0, 1))


def _as_column(row):
  """`[1, W] -> [W, 1]`."""
  return jnp.broadcast_to(row, (128, row.shape[1])).T[:, :1]


def _sum_of_columns(x):
  """`[W, N] -> [1, W]`: lanes are added to lanes, and the rest after a transpose."""
  width = 128 if x.shape[1] % 128 == 0 else x.shape[1]
  folded = functools.reduce(jnp.add, [x[:, i : i + width] for i in range(0, x.shape[1], width)])
  return jnp.sum(folded.T, axis=0, keepdims=True)


def _input_gradient(dpre, plan, into, x_td, tiles):
  """`dgate w_gate^T + dup w_up^T` in packed order."""
  (count, num_rows, _), d_model = dpre.shape, x_td.shape[1]
  return matmul(
    [Rows(dpre, i) for i in range(count)],
    into,
    visit(plan.starts, num_rows, tiles.rows),
    tiles,
    products=[Product(i, i, 0) for i in range(count)],
    transpose_rhs=True,
    outs=[_type((num_rows, d_model), x_td)],
    name='expert_ffn_dx',
  )[0]


def _sums(plan, left, right, tiles, **options):
  """Gradients of weights: sums over the rows of each expert."""
  visits = visit(plan.starts, left.shape[0], tiles.rows, empty=True)
  return sum_of_products(Rows(left), right, visits, tiles, **options)


def _combine(y_rd, token_r, weight_r, plan, x_td, groups):
  """The weighted sum of each token's packed rows, in the type of `x`; weights of one where there are none."""
  num_tokens = x_td.shape[0]
  kept_r = plan.position < plan.starts[-1]
  y_rd = jnp.where(kept_r[:, None], take(y_rd, plan.position).astype(F32), 0)
  if weight_r is not None:
    y_rd = y_rd * jnp.where(kept_r, weight_r.astype(F32), 0)[:, None]
  if groups == num_tokens:  # token-major rows: the sum has a fixed order
    y_td = y_rd.reshape(num_tokens, -1, y_rd.shape[1]).sum(axis=1)
  else:
    y_td = jnp.zeros(x_td.shape, F32).at[token_r].add(y_rd)
  return y_td.astype(x_td.dtype)


def _type(shape, like):
  return Rows(jax.ShapeDtypeStruct(shape, like.dtype))


def _itemsize(*arrays):
  return max(x.dtype.itemsize for x in arrays)
