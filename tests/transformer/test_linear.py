import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.transformer import Embed, LayerNorm, Linear, RMSNorm
from moejax.transformer.linear import product, residual_init


def test_linear_is_a_matrix_product_plus_bias(rng):
  layer = Linear(6, 4, use_bias=True, rngs=nnx.Rngs(0))
  layer.bias[...] = jnp.asarray(rng.normal(size=4).astype(np.float32))
  x = rng.normal(size=(2, 3, 6)).astype(np.float32)
  expected = x @ np.asarray(layer.weight[...]) + np.asarray(layer.bias[...])
  np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-6)


def test_gradients_of_a_product_copy_no_gradient_to_transpose_it(rng):
  """Of 6 x 4 rows of width 8 to width 16: none of the 384 numbers is written anew, as in a product over two axes."""
  shapes = ((6, 4, 8), (8, 16), (6, 4, 16))
  arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

  def compiled(function):
    return jax.jit(lambda x, w, dy: jax.vjp(function, x, w)[1](dy)).lower(*arrays).compile()

  def copied(step):
    made = re.findall(r' = f32\[([0-9,]+)\]\S* (?:copy|transpose)\(', step.as_text())
    return [math.prod(map(int, shape.split(','))) for shape in made]

  ours, over_two_axes = compiled(product), compiled(jnp.matmul)
  assert arrays[-1].size not in copied(ours)
  assert arrays[-1].size in copied(over_two_axes)
  for got, want in zip(ours(*arrays), over_two_axes(*arrays), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_default_weights_have_variance_one_over_fan_in_and_are_truncated():
  weight = np.asarray(Linear(400, 500, rngs=nnx.Rngs(0)).weight[...])
  np.testing.assert_allclose(weight.std(), 400**-0.5, rtol=0.01)
  assert np.abs(weight).max() < 2.3 * 400**-0.5  # cut at two deviations, then scaled by 1 / 0.88


def test_residual_weights_are_smaller_by_the_root_of_twice_the_depth():
  layer = Linear(400, 500, init=residual_init(8), rngs=nnx.Rngs(0))
  np.testing.assert_allclose(np.std(layer.weight[...]), (400 * 16) ** -0.5, rtol=0.01)


@pytest.mark.parametrize('layer', [Linear, Embed])
def test_bfloat16_layers_keep_float32_weights(layer):
  made = layer(6, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert made.weight[...].dtype == jnp.float32
  inputs = jnp.ones((2, 6)) if layer is Linear else jnp.array([1, 2], dtype=jnp.int32)
  assert made(inputs).dtype == jnp.bfloat16


def test_wide_products_of_bfloat16_are_not_rounded_to_bfloat16(rng):
  layer = Linear(64, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  x = jnp.asarray(rng.normal(size=(5, 64)), dtype=jnp.bfloat16)
  wide = layer(x, wide=True)
  assert wide.dtype == jnp.float32
  weight = np.asarray(layer.weight[...].astype(jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_allclose(wide, np.asarray(x.astype(jnp.float32)) @ weight, atol=1e-5)


@pytest.mark.usefixtures('x64')
def test_float64_layers_hold_float64_weights():
  layer = Linear(6, 4, dtype=jnp.float64, rngs=nnx.Rngs(0))
  assert layer.weight[...].dtype == jnp.float64
  assert layer(jnp.ones((2, 6), jnp.float64)).dtype == jnp.float64


def test_embed_reads_rows_and_attends_to_all_of_them(rng):
  embed = Embed(7, 4, rngs=nnx.Rngs(0))
  table = np.asarray(embed.weight[...])
  tokens = jnp.array([[0, 6], [3, 3]], dtype=jnp.int32)
  np.testing.assert_array_equal(embed(tokens), table[np.asarray(tokens)])
  x = rng.normal(size=(2, 3, 4)).astype(np.float32)
  np.testing.assert_allclose(embed.attend(jnp.asarray(x)), x @ table.T, atol=1e-6)


def test_an_id_outside_the_vocabulary_shows_as_nan():
  rows = Embed(7, 4, rngs=nnx.Rngs(0))(jnp.array([6, 7], dtype=jnp.int32))
  assert np.isfinite(rows[0]).all()
  assert np.isnan(rows[1]).all()


def test_rms_norm_divides_by_the_root_mean_square(rng):
  norm = RMSNorm(8, rngs=nnx.Rngs(0))
  norm.scale[...] = jnp.asarray(rng.normal(size=8).astype(np.float32))
  x = 5 * rng.normal(size=(2, 3, 8)).astype(np.float32)
  expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])
  np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_layer_norm_has_mean_bias_and_deviation_scale(rng):
  norm = LayerNorm(8, rngs=nnx.Rngs(0))
  norm.scale[...], norm.bias[...] = 2 * jnp.ones(8), 3 * jnp.ones(8)
  y = np.asarray(norm(jnp.asarray(7 + rng.normal(size=(4, 8)).astype(np.float32))))
  np.testing.assert_allclose(y.mean(axis=-1), 3, atol=1e-5)
  np.testing.assert_allclose(y.std(axis=-1), 2, rtol=1e-4)


@pytest.mark.parametrize('norm', [RMSNorm, LayerNorm])
def test_norms_of_bfloat16_are_rounded_only_at_the_end(norm, rng):
  x = jnp.asarray(rng.normal(size=(4, 64)), dtype=jnp.bfloat16)
  narrow = norm(64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(x)
  wide = norm(64, rngs=nnx.Rngs(0))(x.astype(jnp.float32))
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    narrow.astype(jnp.float32), wide.astype(jnp.bfloat16).astype(jnp.float32)
  )


@pytest.mark.parametrize('norm', [RMSNorm, LayerNorm])
def test_the_gradient_of_a_norm_at_zero_is_finite(norm):
  layer = norm(8, rngs=nnx.Rngs(0))
  assert np.isfinite(jax.grad(lambda x: jnp.sum(layer(x)))(jnp.zeros((1, 8)))).all()
