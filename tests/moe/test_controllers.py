"""The loss-free controller finds every layer's own bias in a stack of repeated units."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.controllers import balance_bias, balance_biases


def test_no_load_no_step_and_zero_rate_no_step():
  bias = jnp.array([0.1, -0.2])
  np.testing.assert_array_equal(balance_bias(bias, jnp.array([3.0, 3.0]), 1e-3), bias)
  np.testing.assert_array_equal(balance_bias(bias, jnp.array([6.0, 0.0]), 0.0), bias)


def test_blocks_of_a_unit_take_turns_and_segments_follow_each_other():
  """Layers 0-3: two repeats of a unit of two mixtures. Layers 4-6: three repeats of one. Each layer has one expert
  with the load, another in every layer."""
  routing = {
    'stack': {
      'segments': {
        0: {'blocks': {0: {'bias': jnp.zeros((2, 7))}, 2: {'bias': jnp.zeros((2, 7))}}},
        1: {'blocks': {0: {'bias': jnp.zeros((3, 7))}}},
      }
    }
  }
  new = balance_biases(routing, 7.0 * jnp.eye(7), 0.5)['stack']['segments']
  want = 0.5 - jnp.eye(7)
  np.testing.assert_array_equal(new[0]['blocks'][0]['bias'], want[jnp.array([0, 2])])
  np.testing.assert_array_equal(new[0]['blocks'][2]['bias'], want[jnp.array([1, 3])])
  np.testing.assert_array_equal(new[1]['blocks'][0]['bias'], want[4:])


def test_what_is_no_bias_is_not_moved():
  """Heads with a frozen router's kernel beside mixtures with a bias: two layers, each with its own load."""
  kernel = jnp.ones((2, 3, 4))
  block = {
    'attention': {'router': {'scorer': {'kernel': kernel}}},
    'moe': {'router': {'bias': jnp.zeros((2, 4))}},
  }
  routing = {'stack': {'segments': {0: {'blocks': {0: block}}}}}
  new = balance_biases(routing, 4.0 * jnp.eye(4)[:2], 0.5)['stack']['segments'][0]['blocks'][0]
  np.testing.assert_array_equal(new['attention']['router']['scorer']['kernel'], kernel)
  np.testing.assert_array_equal(new['moe']['router']['bias'], 0.5 - jnp.eye(4)[:2])


def test_a_skewed_router_balances_within_a_few_hundred_steps():
  """Four experts, k = 1, logits that favour the first by far: the largest load falls below 1.2 of the mean."""
  rng = np.random.default_rng(0)
  scores = 1 / (1 + np.exp(-rng.normal(size=(512, 4)) - np.array([3.0, 0, 0, -1.0])))
  bias = jnp.zeros(4)

  def loads(bias):
    return np.bincount((scores + np.asarray(bias)).argmax(-1), minlength=4)

  assert loads(bias).max() / 128 > 3
  for _ in range(300):
    bias = balance_bias(bias, jnp.asarray(loads(bias), jnp.float32), 1e-2)
  assert loads(bias).max() / 128 == pytest.approx(1, abs=0.2)
