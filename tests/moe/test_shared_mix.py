"""A routed and a shared part, added or mixed (DeepSpeed-MoE)."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import MoE
from tests.routers.table import D, tokens


def test_a_learnt_mix_of_routed_and_shared_is_convex():
  layer = MoE(D, 6, 4, {'name': 'top_k', 'k': 1}, num_shared=1, shared_mix=True, rngs=nnx.Rngs(0))
  plain = MoE(D, 6, 4, {'name': 'top_k', 'k': 1}, rngs=nnx.Rngs(0))
  nnx.update(plain.experts, nnx.split(layer.experts)[1])
  nnx.update(plain.router, nnx.split(layer.router)[1])
  x = tokens()
  bias = layer.shared_mix.bias
  bias[...] = jnp.array([0.3, -0.2])
  logits = np.asarray(x @ layer.shared_mix.weight[...] + jnp.array([0.3, -0.2])[None, None])
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want = share[..., :1] * plain(x)[0] + share[..., 1:] * layer.shared.expert(0)(x)
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_one_expert_and_one_shared_are_two_dense_layers():
  layer = MoE(D, 6, 1, {'name': 'top_k', 'k': 1}, num_shared=1, rngs=nnx.Rngs(0))
  x = tokens()
  want = layer.experts.expert(0)(x) + layer.shared.expert(0)(x)
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_a_mix_without_shared_experts_is_refused():
  message = 'shared_mix=True with num_shared=0: accepted are integers from 1'
  with pytest.raises(ValueError, match=message):
    MoE(D, 6, 4, shared_mix=True, rngs=nnx.Rngs(0))
