"""Weighted sums of single-neuron experts by gather; their backward by scatter, a chunk of tokens at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.chunks import joined, split
from pallas_kernels.activations import ACTIVATIONS
from pallas_kernels.packed import add_rows, take

CHUNK = 128
"""Tokens worked on at once: bounds the gathered rows to `CHUNK * K` of u and of v."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def neurons(
  activation: str,
  x_td: Float[Array, 'T D'],
  expert_tk: Int[Array, 'T K'],
  weight_tk: Float[Array, 'T K'],
  w_up_ed: Float[Array, 'E D'],
  w_down_ed: Float[Array, 'E D'],
) -> Float[Array, 'T D']:
  """`y_t = sum_k weight_tk act(w_up[e] . x_t) w_down[e]` with `e = expert_tk`, in the type of `x`.

  Sums are kept in the type of the weights. Gradients flow to x, weight and both tables; those of the tables are
  dense arrays, which one chunk after the other is added into.
  """
  return _forward(activation, x_td, expert_tk, weight_tk, w_up_ed, w_down_ed)[0]


def _forward(activation, x_td, expert_tk, weight_tk, w_up_ed, w_down_ed):

  def one_chunk(_, chunk):
    x_td, expert_tk, weight_tk = chunk
    up_tkd, down_tkd = (take(w, expert_tk).astype(x_td.dtype) for w in (w_up_ed, w_down_ed))
    pre_tk = jnp.einsum('TD,TKD->TK', x_td, up_tkd)
    hidden_tk = ACTIVATIONS[activation](pre_tk) * weight_tk.astype(x_td.dtype)
    return None, jnp.einsum('TK,TKD->TD', hidden_tk, down_tkd)

  _, y = jax.lax.scan(one_chunk, None, split(CHUNK, x_td, expert_tk, weight_tk))
  return joined(y, len(x_td)), (x_td, expert_tk, weight_tk, w_up_ed, w_down_ed)


def _backward(activation, saved, dy_td):
  x_td, expert_tk, weight_tk, w_up_ed, w_down_ed = saved

  def one_chunk(sums, chunk):
    (dup_ed, ddown_ed), (x_td, expert_tk, weight_tk, dy_td) = sums, chunk
    wide = w_up_ed.dtype
    up_tkd, down_tkd = (take(w, expert_tk).astype(x_td.dtype) for w in (w_up_ed, w_down_ed))
    pre_tk = jnp.einsum('TD,TKD->TK', x_td, up_tkd)
    act_tk, slope_tk = jax.jvp(ACTIVATIONS[activation], (pre_tk,), (jnp.ones_like(pre_tk),))
    gate_tk = weight_tk.astype(x_td.dtype)
    dout_tk = jnp.einsum('TD,TKD->TK', dy_td, down_tkd)
    dpre_tk = dout_tk * gate_tk * slope_tk
    dup_ed = add_rows(dup_ed, expert_tk, (dpre_tk[..., None] * x_td[:, None]).astype(wide))
    down = (act_tk * gate_tk)[..., None] * dy_td[:, None]
    ddown_ed = add_rows(ddown_ed, expert_tk, down.astype(wide))
    dx_td = jnp.einsum('TK,TKD->TD', dpre_tk, up_tkd)
    return (dup_ed, ddown_ed), (dx_td, (dout_tk * act_tk).astype(weight_tk.dtype))

  zeros = (jnp.zeros_like(w_up_ed), jnp.zeros_like(w_down_ed))
  chunks = split(CHUNK, x_td, expert_tk, weight_tk, dy_td)
  (dup_ed, ddown_ed), outs = jax.lax.scan(one_chunk, zeros, chunks)
  dx_td, dweight_tk = (joined(out, len(x_td)) for out in outs)
  return dx_td, None, dweight_tk, dup_ed, ddown_ed


neurons.defvjp(_forward, _backward)
