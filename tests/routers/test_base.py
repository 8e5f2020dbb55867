"""Balanced assignment: exactly the best one, whatever the affinities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import linear_sum_assignment

from moejax import Context, make_router
from moejax.routers.base import balanced_assignment

T, E = 24, 4
solve = jax.jit(balanced_assignment)


CASES = {
  'any': lambda noise: noise,
  "one expert is everybody's favourite": lambda noise: noise + np.array([0, 0, 9, 0]),
  'all tokens alike': lambda noise: np.tile(noise[:1], (T, 1)),
  'all the same': np.ones_like,
  'tiny differences': lambda noise: 5 + 1e-3 * noise,
  'few directions': lambda noise: noise[:, :1] * noise[:1],
}


def draw(name, rng):
  return CASES[name](rng.normal(size=(T, E))).astype(np.float32)


def optimum(affinity):
  """The largest sum with at most C tokens an expert, by SciPy on C copies of every expert."""
  copies = -(-len(affinity) // E)
  token, place = linear_sum_assignment(-np.repeat(affinity.astype(np.float64), copies, 1))
  return affinity[token, place // copies].sum(dtype=np.float64)


@pytest.mark.parametrize('name', CASES)
def test_loads_are_equal_and_the_sum_is_the_optimum(name, rng):
  for _ in range(5):
    affinity = draw(name, rng)
    expert = np.asarray(solve(affinity))
    assert np.bincount(expert, minlength=E).tolist() == [T // E] * E
    got = affinity[np.arange(T), expert].sum(dtype=np.float64)
    spread = float((affinity.max(1) - affinity.min(1)).max())
    assert got == pytest.approx(optimum(affinity), abs=1e-5 * T * max(spread, 1e-6))


def test_padding_and_numbers_that_do_not_divide(rng):
  """17 real tokens of 24 on 4 experts: at most 5 each, the best such assignment, whatever padding holds."""
  affinity = draw('any', rng) + np.array([0, 2, 0, 0], np.float32)
  real = rng.permutation(T) < 17
  expert = np.asarray(solve(affinity, real))
  assert np.bincount(expert[real], minlength=E).max() == 5
  got = affinity[np.arange(T), expert][real].sum(dtype=np.float64)
  assert got == pytest.approx(optimum(affinity[real]), abs=1e-4)
  other = np.where(real[:, None], affinity, 1e6)
  np.testing.assert_array_equal(expert[real], np.asarray(solve(other, real))[real])
  assert solve(affinity, np.zeros(T, bool)).shape == (T,)


def test_training_balances_and_evaluation_is_greedy():
  router = make_router('base', d_model=8, num_experts=E, rngs=nnx.Rngs(0))
  kernel = router.scorer.kernel[...]
  np.testing.assert_allclose(kernel.T @ kernel, 0.01 * np.eye(E), atol=1e-6)  # orthogonal, gain 0.1
  x = jax.random.normal(jax.random.key(0), (2, T // 2, 8)) + 20 * kernel[None, None, :, 0]
  train, greedy = router(x, Context(train=True)), router(x)
  np.testing.assert_array_equal(jnp.bincount(train.expert, length=E), T // E)
  logits = (x @ kernel).reshape(T, E)
  np.testing.assert_array_equal(greedy.expert, logits.argmax(-1))
  assert jnp.bincount(greedy.expert, length=E)[0] > T // E
  for plan in (train, greedy):
    chosen = np.take_along_axis(np.asarray(logits), np.asarray(plan.expert)[:, None], 1)[:, 0]
    np.testing.assert_allclose(plan.weight, 1 / (1 + np.exp(-chosen)), rtol=1e-5)
