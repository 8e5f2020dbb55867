"""The choice of the best: in any number of experts, the one that a sort would put first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routers.top_k import best


@pytest.mark.parametrize('num_experts', [1, 5, 8, 48, 67, 96, 512])
def test_one_choice_is_the_first_of_the_largest(num_experts, rng):
  """Scores of few values, so that nearly every row has ties, also between blocks; a row of -inf; one of one -inf."""
  score = rng.integers(0, 4, size=(3, 40, num_experts)).astype(np.float32)
  score[0, 0] = -np.inf
  score[0, 1, 0] = -np.inf
  value, place = best(jnp.asarray(score), 1)
  first = np.argmax(score, -1)[..., None]  # NumPy's is the first of equals
  np.testing.assert_array_equal(place, first)
  np.testing.assert_array_equal(value, np.take_along_axis(score, first, -1))
  assert place.dtype == jnp.int32


@pytest.mark.parametrize('k', [1, 2])
def test_a_nan_is_the_largest_as_for_top_k(k):
  score = jnp.arange(96, dtype=jnp.float32)[None].at[0, 40].set(jnp.nan)
  for got, want in zip(best(score, k), jax.lax.top_k(score, k), strict=True):
    np.testing.assert_array_equal(got, want)
