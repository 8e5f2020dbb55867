"""Weighted sums of single-neuron experts by gather; their backward by scatter, a chunk of tokens at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.activations import ACTIVATIONS

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
  num_tokens = x_td.shape[0]

  def one_chunk(_, chunk):
    x_td, expert_tk, weight_tk = chunk
    up_tkd, down_tkd = w_up_ed[expert_tk], w_down_ed[expert_tk]
    pre_tk = jnp.einsum('TD,TKD->TK', x_td, up_tkd.astype(x_td.dtype))
    hidden_tk = ACTIVATIONS[activation](pre_tk) * weight_tk.astype(x_td.dtype)
    return None, jnp.einsum('TK,TKD->TD', hidden_tk, down_tkd.astype(x_td.dtype))

  _, y = jax.lax.scan(one_chunk, None, _chunks(x_td, expert_tk, weight_tk))
  y_td = y.reshape(-1, x_td.shape[1])[:num_tokens]
  return y_td, (x_td, expert_tk, weight_tk, w_up_ed, w_down_ed)


def _backward(activation, saved, dy_td):
  x_td, expert_tk, weight_tk, w_up_ed, w_down_ed = saved
  num_tokens = x_td.shape[0]

  def one_chunk(sums, chunk):
    (dup_ed, ddown_ed), (x_td, expert_tk, weight_tk, dy_td) = sums, chunk
    wide = w_up_ed.dtype
    up_tkd, down_tkd = (w[expert_tk].astype(x_td.dtype) for w in (w_up_ed, w_down_ed))
    pre_tk = jnp.einsum('TD,TKD->TK', x_td, up_tkd)
    act_tk, slope_tk = jax.jvp(ACTIVATIONS[activation], (pre_tk,), (jnp.ones_like(pre_tk),))
    gate_tk = weight_tk.astype(x_td.dtype)
    dout_tk = jnp.einsum('TD,TKD->TK', dy_td, down_tkd)
    dpre_tk = dout_tk * gate_tk * slope_tk
    dup_ed = dup_ed.at[expert_tk].add((dpre_tk[..., None] * x_td[:, None]).astype(wide))
    down = (act_tk * gate_tk)[..., None] * dy_td[:, None]
    ddown_ed = ddown_ed.at[expert_tk].add(down.astype(wide))
    dx_td = jnp.einsum('TK,TKD->TD', dpre_tk, up_tkd)
    return (dup_ed, ddown_ed), (dx_td, (dout_tk * act_tk).astype(weight_tk.dtype))

  zeros = (jnp.zeros_like(w_up_ed), jnp.zeros_like(w_down_ed))
  chunks = _chunks(x_td, expert_tk, weight_tk, dy_td)
  (dup_ed, ddown_ed), outs = jax.lax.scan(one_chunk, zeros, chunks)
  dx_td, dweight_tk = (out.reshape(-1, out.shape[-1])[:num_tokens] for out in outs)
  return dx_td, None, dweight_tk, dup_ed, ddown_ed


neurons.defvjp(_forward, _backward)


def _chunks(*arrays: Array) -> tuple[Array, ...]:
  """`[T, ...] -> [chunks, T', ...]`, filled up with zeros: weight 0 of expert 0."""
  num_tokens = arrays[0].shape[0]
  size = min(CHUNK, num_tokens)
  extra = -num_tokens % size
  fill = lambda a: jnp.pad(a, ((0, extra), *((0, 0),) * (a.ndim - 1)))
  return tuple(fill(a).reshape(-1, size, *a.shape[1:]) for a in arrays)
