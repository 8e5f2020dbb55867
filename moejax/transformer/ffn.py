"""The dense feed-forward layer, gated (Shazeer 2020, "GLU variants") or plain."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.transformer.linear import Init, Linear, fan_in_init

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'silu': jax.nn.silu,
  'gelu': jax.nn.gelu,  # the tanh form, as in BERT, GPT-2 and ViT
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, Primer
}


def activation_fn(name: str) -> Callable[[Array], Array]:
  """The activation called `name`; ValueError lists the names."""
  if name not in ACTIVATIONS:
    raise ValueError(f'activation={name!r} is not one of {sorted(ACTIVATIONS)}')
  return ACTIVATIONS[name]


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
    activation_fn(activation)  # refuse an unknown name here, not at the first call
    self.activation = activation
    options = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
    self.gate = Linear(d_model, d_ff, **options) if gated else None
    self.up = Linear(d_model, d_ff, **options)
    self.down = Linear(d_ff, d_model, init=out_init, **options)

  def __call__(self, x: Float[Array, '... D']) -> Float[Array, '... D']:
    activate = activation_fn(self.activation)
    if self.gate is None:
      return self.down(activate(self.up(x)))
    return self.down(activate(self.gate(x)) * self.up(x))
