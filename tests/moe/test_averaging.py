"""Experts drawn together, collapsed, and two passes compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import MoE
from moejax.moe.averaging import average_experts, collapse, consistency_loss


def test_three_experts_move_towards_the_mean_of_the_others():
  got = average_experts({'w': jnp.array([1.0, 2.0, 6.0])}, 0.3)['w']
  np.testing.assert_allclose(got, [1.9, 2.45, 4.65], rtol=1e-6)
  np.testing.assert_allclose(average_experts(jnp.array([1.0, 2.0, 6.0]), 2 / 3), 3, rtol=1e-6)
  stacked = jnp.array([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]])
  np.testing.assert_allclose(average_experts(stacked, 0.3, axis=1)[0], got, rtol=1e-6)
  np.testing.assert_array_equal(average_experts(jnp.array([5.0]), 0.3), [5.0])


def test_equal_experts_collapse_to_the_layer_that_they_were():
  layer = MoE(8, 4, 3, 'ewa', rngs=nnx.Rngs(0))
  weights = nnx.split(layer.experts)[1]
  spread = jax.tree.map(lambda w: float(jnp.abs(w - w.mean(0, keepdims=True)).max()), weights)
  assert min(jax.tree.leaves(spread)) > 0.01
  nnx.update(layer.experts, average_experts(weights, 2 / 3))
  x = jax.random.normal(jax.random.key(0), (2, 5, 8))
  dense = nnx.to_pure_dict(collapse(nnx.split(layer.experts)[1]))
  want = (jax.nn.silu(x @ dense['w_gate']) * (x @ dense['w_up'])) @ dense['w_down']
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)
  np.testing.assert_allclose(dense['w_up'], weights['w_up'][...].mean(0), atol=1e-6)


def test_consistency_of_two_predictions():
  a, b = jnp.array([[1.0, 0.0, 0.0]]), jnp.array([[0.0, 1.0, 0.0]])
  assert float(consistency_loss(a, b)) == pytest.approx(0.364175, abs=1e-6)
  assert float(consistency_loss(b, a)) == pytest.approx(0.364175, abs=1e-6)
  assert float(consistency_loss(a, a + 3)) == pytest.approx(0, abs=1e-6)
  mask = jnp.array([True, False, True])
  both = consistency_loss(jnp.tile(a, (3, 1)), jnp.concatenate([b, 50 * b, a]), mask)
  assert float(both) == pytest.approx(0.364175 / 2, abs=1e-6)
  assert float(consistency_loss(a, b, jnp.array([False]))) == 0
