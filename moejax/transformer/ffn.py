"""The dense feed-forward layer, gated (Shazeer 2020, "GLU variants") or plain."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.sizes import check_made_of
from moejax.transformer.linear import Init, Linear, fan_in_init
from pallas_kernels import check_activation, hidden


class FFN(nnx.Module):
  """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` with `gated=False`; d_ff is the hidden width."""

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    *,
    activation: str = 'silu',
    gated: bool = True,
    use_bias: bool = False,
    out_init: Init = fan_in_init,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, d_ff=d_ff)
    check_activation(activation)
    self.activation = activation
    options = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
    self.gate = Linear(d_model, d_ff, **options) if gated else None
    self.up = Linear(d_model, d_ff, **options)
    self.down = Linear(d_ff, d_model, init=out_init, **options)

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    pre = (self.up(x),) if self.gate is None else (self.gate(x), self.up(x))
    return self.down(hidden(self.activation, pre))
