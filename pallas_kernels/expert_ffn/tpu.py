"""`expert_ffn` for TPUs: matmuls of packed rows with the activation or its derivative in their epilogue."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import tpu_tiles
from ..activations import hidden
from ..packed import Plan
from ..registry import Unsupported
from ..tpu_matmul import Product, Rows, matmul, sum_of_products
from ..tpu_tiles import Tiles
from ..visits import visit
from . import composed
from .composed import saved_rows as saved_rows

Array = jax.Array
F32 = jnp.float32


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
  tiles = check(x_td, token_r.shape[0], into, w_down, save)
  kernels = _Kernels(tiles, plan, into, w_down, activation)
  return composed.forward(kernels, x_td, token_r, weight_r, plan, groups=groups, save=save)


def backward(x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups):
  """Same values as cpu.backward."""
  tiles = check(x_td, token_r.shape[0], into, w_down)
  kernels = _Kernels(tiles, plan, into, w_down, activation)
  return composed.backward(kernels, x_td, token_r, weight_r, plan, pre, dy_td, groups=groups)


class _Kernels(NamedTuple):
  """See composed.Kernels; gradients of pre-activations are `[1 or 2, R, F]`."""

  tiles: _Tiles
  plan: Plan
  into: tuple[Array, ...]
  w_down: Array
  activation: str

  def up(self, x_rd, save):
    (num_rows, _), d_ff, count = x_rd.shape, self.w_down.shape[1], len(self.into)
    outs = [_type((num_rows, d_ff), x_rd), *([_type((count, save, d_ff), x_rd)] if save else [])]

    def activate(sums, extras):
      return [hidden(self.activation, tuple(sums)), *([tuple(sums)] if save else [])]

    a_rf, *saved = matmul(
      [Rows(x_rd)],
      self.into,
      visit(self.plan.starts, num_rows, self.tiles.up.rows),
      self.tiles.up,
      products=[Product(0, i, i) for i in range(count)],
      outs=outs,
      epilogue=activate,
      name='expert_ffn_up',
    )
    return a_rf, saved[0] if save else None

  def down(self, a_rf):
    num_rows, tiles = a_rf.shape[0], self.tiles.down
    visits = visit(self.plan.starts, num_rows, tiles.rows)
    outs = [_type((num_rows, self.w_down.shape[2]), a_rf)]
    return matmul([Rows(a_rf)], [self.w_down], visits, tiles, outs=outs, name='expert_ffn_down')[0]

  def hidden_gradient(self, dy_rd, weight_r, pre):
    num_rows, d_ff, count = dy_rd.shape[0], self.w_down.shape[1], pre.shape[0]
    tiles, activation = self.tiles.dhidden, self.activation

    def differentiate(sums, extras):
      (da_wf,), (pre_wf, weight_w) = sums, extras
      a_wf, pull = jax.vjp(lambda p: hidden(activation, p), tuple(p.astype(F32) for p in pre_wf))
      weight_w1 = _as_column(weight_w)
      (dpre_wf,) = pull(da_wf * weight_w1)
      return [dpre_wf, a_wf * weight_w1, _sum_of_columns(a_wf * da_wf)]

    dpre, a_rf, partial = matmul(
      [Rows(dy_rd)],
      [self.w_down],
      visit(self.plan.starts, num_rows, tiles.rows),
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

  def input_gradient(self, dpre):
    count, num_rows, _ = dpre.shape
    return matmul(
      [Rows(dpre, i) for i in range(count)],
      self.into,
      visit(self.plan.starts, num_rows, self.tiles.dx.rows),
      self.tiles.dx,
      products=[Product(i, i, 0) for i in range(count)],
      transpose_rhs=True,
      outs=[_type((num_rows, self.w_down.shape[2]), dpre)],
      name='expert_ffn_dx',
    )[0]

  def weight_gradients(self, x_rd, dpre, a_rf, dy_rd):
    rights = [Rows(dpre, i) for i in range(len(self.into))]
    options = dict(dtype=self.into[0].dtype, name='expert_ffn_dup')
    dinto = self._sums(x_rd, rights, self.tiles.dup, **options)
    options = dict(dtype=self.w_down.dtype, name='expert_ffn_ddown')
    (ddown,) = self._sums(a_rf, [Rows(dy_rd)], self.tiles.ddown, **options)
    return tuple(dinto), ddown

  def _sums(self, left, right, tiles, **options):
    """Sums over the rows of each expert."""
    visits = visit(self.plan.starts, left.shape[0], tiles.rows, empty=True)
    return sum_of_products(Rows(left), right, visits, tiles, **options)


def _as_column(row):
  """`[1, W] -> [W, 1]`."""
  return jnp.broadcast_to(row, (128, row.shape[1])).T[:, :1]


def _sum_of_columns(x):
  """`[W, N] -> [1, W]`: lanes are added to lanes, and the rest after a transpose."""
  width = 128 if x.shape[1] % 128 == 0 else x.shape[1]
  folded = functools.reduce(jnp.add, [x[:, i : i + width] for i in range(0, x.shape[1], width)])
  return jnp.sum(folded.T, axis=0, keepdims=True)


def _type(shape, like):
  return Rows(jax.ShapeDtypeStruct(shape, like.dtype))


def _itemsize(*arrays):
  return max(x.dtype.itemsize for x in arrays)
