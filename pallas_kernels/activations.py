"""Elementwise activations by name, and the hidden layer of a feed-forward expert made of them."""

import jax
import jax.numpy as jnp

ACTIVATIONS = {
  'gelu': jax.nn.gelu,  # the tanh approximation
  'relu': jax.nn.relu,
  'relu2': lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv 2109.08668
  'silu': jax.nn.silu,
}


def check_activation(name: str) -> None:
  """Refuses unknown activations.

  Raises:
    ValueError: `name` is not in ACTIVATIONS.
  """
  if name not in ACTIVATIONS:
    raise ValueError(f'activation={name!r}: accepted are {", ".join(ACTIVATIONS)}')


def hidden(activation: str, pre: tuple[jax.Array, ...]) -> jax.Array:
  """`act(gate) * up` of two pre-activations (GLU variants, arXiv 2002.05202), `act(up)` of one."""
  first = ACTIVATIONS[activation](pre[0])
  return first * pre[1] if len(pre) == 2 else first
