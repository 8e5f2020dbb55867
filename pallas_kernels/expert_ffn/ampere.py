"""`expert_ffn` for NVIDIA Ampere and Ada: its products are those of `grouped_matmul`, all between them is XLA's.

A block there has one warpgroup, whose registers hold the sums of one matrix: those of gate and up do not fit together,
so the activation and its derivative read pre-activations and gradients that are rounded to the type of x.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..activations import hidden
from ..ampere import machine, rows
from ..hopper import tiles
from ..packed import Plan
from . import composed
from .composed import saved_rows as saved_rows

Array = jax.Array
F32 = jnp.float32


def forward(x_td, token_r, weight_r, plan, into, w_down, *, activation, groups, save):
  """Same values as cpu.forward.

  Raises:
    Unsupported: jax before 0.11, types other than one 16-bit type (w may be float32), widths that are no multiples
      of 128.
  """
  kernels = _kernels(x_td, token_r, plan, into, w_down, activation)
  return composed.forward(kernels, x_td, token_r, weight_r, plan, groups=groups, save=save)


def backward(x_td, token_r, weight_r, plan, into, w_down, pre, dy_td, *, activation, groups):
  """Same values as cpu.backward, to the precision of the type of x."""
  kernels = _kernels(x_td, token_r, plan, into, w_down, activation)
  return composed.backward(kernels, x_td, token_r, weight_r, plan, pre, dy_td, groups=groups)


class _Kernels(NamedTuple):
  """See composed.Kernels; gradients of pre-activations are a tuple of `[R, F]`."""

  machine: machine.Hardware
  tile: int
  plan: Plan
  into: tuple[Array, ...]
  w_down: Array
  activation: str

  def up(self, x_rd, save):
    pre = tuple(self._product(x_rd, w) for w in self.into)
    a_rf = hidden(self.activation, _wide(pre)).astype(x_rd.dtype)
    if not save:
      return a_rf, None
    return a_rf, jnp.pad(jnp.stack(pre), ((0, 0), (0, save - x_rd.shape[0]), (0, 0)))

  def down(self, a_rf):
    return self._product(a_rf, self.w_down)

  def hidden_gradient(self, dy_rd, weight_r, pre):
    da_rf = self._product(dy_rd, self.w_down, transposed=True).astype(F32)
    saved = _wide(pre[:, : dy_rd.shape[0]])
    a_rf, pull = jax.vjp(lambda saved: hidden(self.activation, saved), saved)
    weight_r1 = weight_r.astype(F32)[:, None]
    (dpre,) = pull(da_rf * weight_r1)
    narrow = lambda values: values.astype(dy_rd.dtype)
    return tuple(map(narrow, dpre)), narrow(a_rf * weight_r1), jnp.sum(a_rf * da_rf, axis=1)

  def input_gradient(self, dpre):
    products = [self._product(d, w, transposed=True) for d, w in zip(dpre, self.into, strict=True)]
    return sum(_wide(products))

  def weight_gradients(self, x_rd, dpre, a_rf, dy_rd):
    dinto = tuple(self._sums(x_rd, d, w) for d, w in zip(dpre, self.into, strict=True))
    return dinto, self._sums(a_rf, dy_rd, self.w_down)

  def _product(self, x, w, *, transposed=False):
    matrices, starts = w.astype(x.dtype), self.plan.starts
    return rows.products(self.machine, x, matrices, starts, self.tile, transposed=transposed)

  def _sums(self, left, right, w):
    return rows.sums(self.machine, left, right, self.plan.starts, jnp.dtype(w.dtype))


def _kernels(x_td, token_r, plan, into, w_down, activation) -> _Kernels:
  weights = dict(w_gate=into[0], w_up=into[-1], w_down=w_down)
  tiles.check_types('expert_ffn', x_td, body='ampere', **weights)
  widths = dict(d_model=x_td.shape[1], d_ff=w_down.shape[1])
  tiles.check_widths('expert_ffn', body='ampere', **widths)
  tile = tiles.rows_per_tile(token_r.shape[0], w_down.shape[0])
  return _Kernels(machine.current('expert_ffn'), tile, plan, into, w_down, activation)


def _wide(arrays):
  return tuple(x.astype(F32) for x in arrays)
