import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.transformer import rotate, rotation


def turned_by_complex_numbers(x, positions, theta=10000.0):
  half = x.shape[-1] // 2
  frequency = theta ** (-np.arange(half) / half)
  turn = np.exp(1j * positions[:, :, None] * frequency[None, None, :])[:, :, None, :]
  z = (x[..., :half] + 1j * x[..., half:]) * turn
  return np.concatenate([z.real, z.imag], axis=-1)


def test_rotation_is_multiplication_by_complex_numbers_of_modulus_one(rng):
  x = rng.normal(size=(2, 5, 3, 8)).astype(np.float32)
  positions = rng.integers(0, 1000, size=(2, 5)).astype(np.int32)
  y = rotate(jnp.asarray(x), *rotation(jnp.asarray(positions), 8))
  # float32 angles near 1000 are good to 6e-5
  np.testing.assert_allclose(y, turned_by_complex_numbers(x, positions), atol=3e-4)
  np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@given(query=st.integers(0, 500), key=st.integers(0, 500), shift=st.integers(0, 500))
def test_products_depend_on_the_difference_of_positions_only(query, key, shift):
  rng = np.random.default_rng(query)
  q, k = (jnp.asarray(rng.normal(size=(1, 1, 2, 16)).astype(np.float32)) for _ in range(2))

  def product(position_q, position_k):
    turned = [
      rotate(x, *rotation(jnp.array([[p]], dtype=jnp.int32), 16))
      for x, p in ((q, position_q), (k, position_k))
    ]
    return np.sum(np.asarray(turned[0]) * np.asarray(turned[1]), axis=-1)

  np.testing.assert_allclose(product(query, key), product(query + shift, key + shift), atol=2e-3)


def test_one_set_of_positions_serves_every_sequence(rng):
  x = jnp.asarray(rng.normal(size=(3, 4, 2, 8)).astype(np.float32))
  positions = jnp.arange(4, dtype=jnp.int32)[None, :]
  shared = rotate(x, *rotation(positions, 8))
  np.testing.assert_array_equal(shared, rotate(x, *rotation(jnp.tile(positions, (3, 1)), 8)))


def test_bfloat16_is_turned_in_float32_and_comes_back_bfloat16(rng):
  x = jnp.asarray(rng.normal(size=(1, 4, 2, 8)), dtype=jnp.bfloat16)
  turn = rotation(jnp.arange(4, dtype=jnp.int32)[None, :], 8)
  y = rotate(x, *turn)
  assert y.dtype == jnp.bfloat16
  expected = rotate(x.astype(jnp.float32), *turn).astype(jnp.bfloat16)
  np.testing.assert_array_equal(y.astype(jnp.float32), expected.astype(jnp.float32))


def test_odd_heads_are_refused():
  with pytest.raises(ValueError, match='head_dim=7'):
    rotation(jnp.zeros((1, 2), jnp.int32), 7)
