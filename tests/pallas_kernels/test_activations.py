"""The table of activations against formulas written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.activations import ACTIVATIONS, hidden

POINTS = np.array([-3.0, -0.5, 0.25, 2.0], np.float32)
FORMULAS = {
  'gelu': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
  'relu': lambda x: np.maximum(x, 0),
  'relu2': lambda x: np.maximum(x, 0) ** 2,
  'silu': lambda x: x / (1 + np.exp(-x)),
}


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_values_and_slopes(name):
  formula, step = FORMULAS[name], 1e-4
  wide = POINTS.astype(np.float64)
  slope = (formula(wide + step) - formula(wide - step)) / (2 * step)
  np.testing.assert_allclose(ACTIVATIONS[name](POINTS), formula(wide), rtol=1e-5, atol=1e-6)
  found = jax.vmap(jax.grad(ACTIVATIONS[name]))(POINTS)
  np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-5)


def test_the_gate_is_activated_and_the_other_half_is_not():
  gate, up = jnp.asarray(POINTS), jnp.asarray(POINTS[::-1])
  np.testing.assert_allclose(hidden('relu', (gate, up)), jnp.maximum(gate, 0) * up)
  np.testing.assert_allclose(hidden('relu', (gate,)), np.maximum(gate, 0))
