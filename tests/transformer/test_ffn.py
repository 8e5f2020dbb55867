import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.transformer import FFN

ACTIVATIONS = {
  'silu': lambda x: x / (1 + np.exp(-x)),
  'gelu': lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
  'relu': lambda x: np.maximum(x, 0),
  'relu2': lambda x: np.maximum(x, 0) ** 2,
}


@pytest.mark.parametrize('name', ACTIVATIONS)
@pytest.mark.parametrize('gated', [True, False])
def test_ffn_equals_its_formula(name, gated, rng):
  layer = FFN(6, 10, activation=name, gated=gated, rngs=nnx.Rngs(0))
  x = rng.normal(size=(2, 3, 6)).astype(np.float32)
  matrix = lambda part: np.asarray(part.weight[...])
  up = x @ matrix(layer.up)
  hidden = ACTIVATIONS[name](x @ matrix(layer.gate)) * up if gated else ACTIVATIONS[name](up)
  np.testing.assert_allclose(layer(jnp.asarray(x)), hidden @ matrix(layer.down), atol=1e-5)


def test_biases_are_there_when_asked_for():
  layer = FFN(6, 10, gated=False, use_bias=True, rngs=nnx.Rngs(0))
  layer.down.bias[...] = jnp.arange(6, dtype=jnp.float32)
  np.testing.assert_array_equal(layer(jnp.zeros((1, 6)))[0], np.arange(6))


def test_an_unknown_activation_is_refused_with_the_names():
  with pytest.raises(ValueError, match=r"activation='swish'.*silu"):
    FFN(6, 10, activation='swish', rngs=nnx.Rngs(0))
