"""The logits that published values are computed of, and how these tests make and read routers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import make_router

D = 8

# The table of tests/moe/test_golden.py: six tokens, four experts.
H = jnp.array(
  [
    [2.0, 1.0, 0.0, -1.0],
    [1.5, 1.4, 0.2, 0.1],
    [0.3, 2.2, 0.1, -0.5],
    [1.8, -0.2, 0.9, 0.4],
    [2.5, 0.6, -0.3, 0.0],
    [0.0, 0.1, 0.2, 0.3],
  ],
  jnp.float32,
)


def tokens(shape=(2, 6, D), seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


def make(name, num_experts=4, **options):
  return make_router(name, d_model=D, num_experts=num_experts, rngs=nnx.Rngs(0), **options)


def kept(plan):
  """Experts kept by each token."""
  return (np.asarray(plan.expert) < plan.num_experts).reshape(plan.groups, -1).sum(1)
