"""The k largest in rounds are those of XLA's top_k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe.largest import GROUP, largest


@pytest.mark.parametrize('kind', ['normal', 'few values'])
@pytest.mark.parametrize(
  ('size', 'k'),
  [(1, 1), (50, 16), (64, 1), (64, 4), (64, 64), (1024, 16)],
  ids=lambda value: str(value),
)
def test_values_and_numbers_are_those_of_top_k(size, k, kind):
  """With equal values the lowest number comes first, within groups and across them."""
  x = jax.random.normal(jax.random.key(size), (size, 3, 40))
  x = x if kind == 'normal' else jnp.round(x) + 0  # top_k tells -0 from 0
  value, number = jax.jit(largest, static_argnums=1)(x, k)
  same, place = jax.lax.top_k(jnp.moveaxis(x, 0, -1), k)
  assert number.dtype == jnp.int32
  np.testing.assert_array_equal(jnp.moveaxis(value, 0, -1), same)
  np.testing.assert_array_equal(jnp.moveaxis(number, 0, -1), place)


@pytest.mark.parametrize('size', [6, 8 * GROUP])
def test_a_nan_comes_first_and_every_number_is_one_of_an_entry(size):
  x = jax.random.normal(jax.random.key(0), (size, 9)).at[3, 4].set(jnp.nan)
  value, number = largest(x, 3)
  assert jnp.isnan(value[0, 4])
  assert int(number.min()) >= 0 and int(number.max()) < size
  same, _ = jax.lax.top_k(jnp.delete(x, 4, 1, assume_unique_indices=True).T, 3)
  np.testing.assert_array_equal(jnp.delete(value, 4, 1, assume_unique_indices=True).T, same)
