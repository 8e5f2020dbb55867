"""A trace is what the layers of the running model decide."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import MoE
from moejax.placement.routing_trace import routing_trace
from moejax.transformer import Decoder

run = nnx.jit(Decoder.__call__, static_argnames='train')
traced = nnx.jit(routing_trace, static_argnames='train')


def test_the_trace_counts_what_the_model_counts():
  """Three mixtures of five layers: rows by expert are those of the model's own statistics."""
  moe = lambda rngs: MoE(8, 12, 4, {'name': 'top_k', 'k': 2, 'noise_std': 1.0}, rngs=rngs)
  model = Decoder(16, 8, 5, 2, 16, moe=moe, moe_layers=(0, 2, 4), rngs=nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(1), (3, 6), 0, 16)
  options = dict(
    mask=jnp.arange(6)[None, :] < jnp.array([[6], [4], [5]]), rng=jax.random.key(2), train=True
  )
  _, stats = run(model, tokens, **options)
  trace = traced(model, tokens, **options)
  counted = [np.bincount(np.asarray(one.expert), minlength=5)[:4] for one in trace]
  np.testing.assert_array_equal(counted, stats.kept_e)
  assert np.sum(counted) == 3 * 2 * (6 + 4 + 5)


def test_the_trace_of_momentum_that_looks_ahead_is_that_of_the_model():
  """The robust momentum's router reads the tokens moved by what the layers below left."""
  momentum = {'name': 'robust', 'rho': 0.9}
  moe = lambda rngs: MoE(8, 12, 4, momentum=momentum, rngs=rngs)
  model = Decoder(16, 8, 3, 2, 16, moe=moe, moe_layers=(0, 1, 2), rngs=nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(1), (3, 16), 0, 16)
  _, stats = run(model, tokens)
  counted = [np.bincount(np.asarray(one.expert), minlength=4) for one in traced(model, tokens)]
  np.testing.assert_array_equal(counted, stats.kept_e)
