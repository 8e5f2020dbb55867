"""Softmax with its log-partition function: values and gradients of JAX's own two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Context
from moejax.routers.affinity import TokenAffinity, softmax
from moejax.routers.weighting import WEIGHTINGS

LOGITS = {
  'any': [[0.3, -1.2, 2.0, 0.1], [5.0, 5.0, -5.0, 0.0]],
  'far apart': [[1e4, -1e4, 0.0, 9.9e3], [-1e4, -1e4, -1e4, -1e4]],
  'some experts masked': [[-jnp.inf, 1.0, -jnp.inf, 0.5], [0.0, -jnp.inf, -jnp.inf, -jnp.inf]],
}


def by_jax(logits):
  return jax.nn.softmax(logits, -1), jax.nn.logsumexp(logits, -1)


@pytest.mark.parametrize('name', LOGITS)
def test_values_and_gradients_are_those_of_the_two_functions(name, rng):
  logits = jnp.asarray(LOGITS[name], jnp.float32)
  weight = jnp.asarray(rng.normal(size=logits.shape), jnp.float32)

  def loss(function):
    def of(logits):
      probs, partition = function(logits)
      return (weight * probs * probs).sum() + (weight[:, 0] * partition**2).sum()

    return jax.jit(jax.grad(of))(logits)

  for got, want in zip(softmax(logits), by_jax(logits), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(loss(softmax), loss(by_jax), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize('part', [0, 1])
def test_gradients_go_through_either_output_alone_and_twice(part):
  logits = jnp.asarray(LOGITS['any'], jnp.float32)

  def slope(function):
    return jax.grad(lambda logits: (function(logits)[part] ** 2)[0].sum())

  def curvature(function):
    return jax.grad(lambda logits: slope(function)(logits)[0, 0])

  for derivative in (slope, curvature):
    got, want = (derivative(function)(logits) for function in (softmax, by_jax))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('weighting', ['sigmoid_norm', 'softmax_topk_norm_sg'])
def test_weights_of_experts_that_nobody_wants_are_zero_and_so_is_their_gradient(weighting):
  """Sigmoids that are 0 in float32, and shares of them: no 0 / 0, neither forward nor backward."""
  weights = WEIGHTINGS[weighting][1]

  def loss(logits):
    scores = TokenAffinity('sigmoid', 2)(logits, None, None, Context())
    return weights(scores.gate).sum() + scores.probs.sum()

  value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1, 3), -200.0))
  assert float(value) == 0
  np.testing.assert_array_equal(gradient, jnp.zeros((1, 1, 3)))
