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


@pytest.mark.parametrize('kinds', [256, 5, 1])
def test_many_small_experts_and_tokens_of_which_many_are_equal(kinds, rng):
  """256 tokens on 64 experts of 4 places, all unlike or of few kinds: equal tokens must part, many at a time."""
  affinity = rng.normal(size=(kinds, 64)).astype(np.float32)[rng.integers(0, kinds, 256)]
  expert = np.asarray(jax.jit(balanced_assignment)(affinity))
  assert np.bincount(expert, minlength=64).tolist() == [4] * 64
  token, place = linear_sum_assignment(-np.repeat(affinity.astype(np.float64), 4, 1))
  best = affinity[token, place // 4].sum(dtype=np.float64)
  assert affinity[np.arange(256), expert].sum(dtype=np.float64) == pytest.approx(best, abs=2e-3)


def test_groups_are_assigned_together_as_each_alone(rng):
  """Groups that end after unlike numbers of moves, as accelerators work on them."""
  groups = np.stack([draw(name, rng) for name in CASES])
  together = np.asarray(jax.jit(jax.vmap(balanced_assignment))(groups))
  for affinity, expert in zip(groups, together, strict=True):
    np.testing.assert_array_equal(expert, np.asarray(solve(affinity)))


def test_a_number_of_tokens_that_does_not_divide(rng):
  """22 tokens on 4 experts without padding: none has more than 6."""
  affinity = draw('any', rng)[:22]
  expert = np.asarray(jax.jit(balanced_assignment)(affinity))
  assert np.bincount(expert, minlength=E).max() <= 6
  got = affinity[np.arange(22), expert].sum(dtype=np.float64)
  assert got == pytest.approx(optimum(affinity), abs=1e-4)


def test_tokens_without_finite_affinities_take_what_is_left(rng):
  """The others have the best places, as many as are theirs; it ends."""
  affinity = draw('any', rng)
  odd = affinity.copy()
  odd[3, 1], odd[7, 0], odd[8, 2] = np.nan, np.inf, -np.inf
  expert = np.asarray(solve(odd))
  assert np.bincount(expert, minlength=E).tolist() == [T // E] * E
  known = np.isfinite(odd).all(1)
  indifferent = np.where(known[:, None], affinity - affinity.max(1, keepdims=True), 0)
  got = indifferent[np.arange(T), expert].sum(dtype=np.float64)
  assert got == pytest.approx(optimum(indifferent), abs=1e-4)


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
