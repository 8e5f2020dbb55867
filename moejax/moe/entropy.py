"""The terms of an entropy, with a gradient where a probability is zero."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def entropy_terms(p: Float[Array, '*shape']) -> Float[Array, '*shape']:
  """`-p log p` of every entry, in nats; 0 with gradient 0 where p is 0.

  The derivative of `jax.scipy.special.entr` is infinite there, and infinity times the derivative of a softmax that has
  come to 0 is NaN: one token whose router is certain would spoil a step.
  """
  positive = p > 0
  return jnp.where(positive, -(p * jnp.log(jnp.where(positive, p, 1))), 0)
