"""A small stand-in for a mixture: these tests are about the transformer around it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax.arrays import Aux, RoutingStats


class RouterBias(nnx.Variable):
  """A variable that is no parameter, as a balanced router has."""


class ToyMoE(nnx.Module):
  """Dense mixture of 3 matrices: softmax(x @ router + bias + noise) weighs x @ expert."""

  def __init__(self, d_model, rngs):
    self.router = nnx.Param(jax.random.normal(rngs.params(), (d_model, 3)) / d_model**0.5)
    self.experts = nnx.Param(0.3 * jax.random.normal(rngs.params(), (3, d_model, d_model)))
    self.bias = RouterBias(jnp.zeros((3,)))

  def __call__(self, x, context):
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    logits = (x @ self.router[...].astype(x.dtype)).astype(wide)
    logits = logits + self.bias[...].astype(wide)[None, None, :]
    if context.rng is not None:
      logits = logits + jax.random.normal(context.rng, logits.shape, wide)
    probs = jax.nn.softmax(logits)
    experts = self.experts[...].astype(x.dtype)
    y = jnp.einsum('bsd,edf,bse->bsf', x, experts, probs.astype(x.dtype))
    real = jnp.ones(x.shape[:2], wide) if context.mask is None else context.mask.astype(wide)
    per_expert = jnp.einsum('bse,bs->e', probs, real)
    zero = jnp.zeros(())
    stats = RoutingStats(
      tokens=jnp.sum(real),
      chosen_e=per_expert,
      kept_e=per_expert,
      prob_e=per_expert,
      weight_e=per_expert,
      load_e=per_expert,
      z=zero,
      entropy=zero,
      sequence_balance=zero,
      unrouted=zero,
    )
    return y, Aux(losses={}, metrics={}, stats=stats)


@pytest.fixture
def toy_moe():
  """`toy_moe(d_model)(rngs)` makes one stand-in mixture."""
  return lambda d_model: lambda rngs: ToyMoE(d_model, rngs)
