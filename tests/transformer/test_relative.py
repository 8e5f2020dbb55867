"""Relative position biases against loops: buckets by bounds, scores entry by entry, and whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.transformer import Decoder, Encoder
from moejax.transformer.attention import Attention
from moejax.transformer.relative import RelativeBias, buckets, toeplitz

V = 20
SIZES = (V, 16, 2, 2, 24)


def bucket_by_bounds(back, side):
  """Of a distance to one side: how many bounds it has passed. Half are 1, 2, 3, ..., then they grow to 128."""
  exact = side // 2
  bounds = [*range(1, exact + 1)]
  bounds += [exact * (128 / exact) ** (k / (side - exact)) for k in range(1, side - exact)]
  return sum(back > bound - 1e-6 for bound in bounds)


def test_the_buckets_of_a_causal_model_are_all_for_the_past():
  distance = np.arange(-200, 201)
  expected = [bucket_by_bounds(-d, 32) if d < 0 else 0 for d in distance]
  found = buckets(distance, causal=True)
  assert found.tolist() == expected
  assert found.max() == 31


def test_the_buckets_of_an_encoder_are_shared_by_past_and_future():
  distance = np.arange(-200, 201)
  expected = [bucket_by_bounds(abs(d), 16) + (16 if d > 0 else 0) for d in distance]
  found = buckets(distance, causal=False)
  assert found.tolist() == expected
  assert sorted(set(found)) == [*range(16), *range(17, 32)]  # no distance to the future is 0


def test_every_diagonal_has_its_own_number():
  numbers = np.arange(2 * 7, dtype=np.float32).reshape(2, 7)
  found = toeplitz(jnp.asarray(numbers))
  for head in range(2):
    for i in range(4):
      for j in range(4):
        assert found[head, i, j] == numbers[head, j - i + 3]


@pytest.mark.parametrize('causal', [True, False])
def test_attention_adds_the_bias_of_the_distance_to_every_score(causal, rng):
  length, heads, kv_heads, width = 6, 4, 2, 4
  layer = Attention(
    8, heads, kv_heads, width, causal=causal, relative=True, rngs=nnx.Rngs(0)
  )  # fmt: skip
  table = rng.normal(size=(32, heads)).astype(np.float32)
  layer.bias.relative_positions[...] = jnp.asarray(table)
  x = jnp.asarray(rng.normal(size=(2, length, 8)).astype(np.float32))
  q, k, v = (np.asarray(f(x)).reshape(2, length, -1, width) for f in (layer.query, layer.key, layer.value))  # fmt: skip
  mixed = np.zeros((2, length, heads, width))
  for b in range(2):
    for n in range(heads):
      for i in range(length):
        keys = range(i + 1) if causal else range(length)
        index = [
          bucket_by_bounds(abs(j - i), 32 if causal else 16) + (16 if j > i else 0) for j in keys
        ]
        scores = [
          q[b, i, n] @ k[b, j, n // 2] / width**0.5 + table[at, n]
          for j, at in zip(keys, index, strict=True)
        ]
        weights = np.exp(scores) / np.exp(scores).sum()
        mixed[b, i, n] = sum(w * v[b, j, n // 2] for w, j in zip(weights, keys, strict=True))
  expected = layer.out(jnp.asarray(mixed.reshape(2, length, -1).astype(np.float32)))
  np.testing.assert_allclose(layer(x), expected, atol=1e-5)


def test_the_gradient_of_the_table_is_that_of_a_gather(rng):
  layer = RelativeBias(2, causal=False, rngs=nnx.Rngs(0))
  graph, state = nnx.split(layer)
  weight = jnp.asarray(rng.normal(size=(2, 9, 9)).astype(np.float32))
  found = jax.grad(lambda s: (nnx.merge(graph, s)(9) * weight).sum())(state)
  place = buckets(np.arange(9)[None, :] - np.arange(9)[:, None], causal=False)
  expected = np.zeros((32, 2), np.float32)
  for i in range(9):
    for j in range(9):
      expected[place[i, j]] += weight[:, i, j]
  np.testing.assert_allclose(jax.tree.leaves(found)[0], expected, atol=1e-5)


@pytest.mark.parametrize('make', [Decoder, Encoder])
def test_models_have_biases_in_place_of_rotation(make, toy_moe, rng):
  options = dict(moe=toy_moe(16), moe_layers=(1,), positions='relative')
  model = make(*SIZES, **options, rngs=nnx.Rngs(0))
  tokens = jnp.asarray(rng.integers(0, V, size=(1, 11)), dtype=jnp.int32)
  logits = model(tokens)[0]
  # a decoder's earlier logits do not see a later token; an encoder's do
  later = model(tokens.at[:, 8].set((tokens[:, 8] + 1) % V))[0]
  changed = np.abs(later - logits)[:, :8].max()
  assert changed == 0 if make is Decoder else changed > 1e-6
  # places count, by their distances alone: a document is the same wherever it begins
  segments = jnp.array([[1] * 4 + [2] * 7], dtype=jnp.int32)
  packed = model(tokens, segment_ids=segments)[0]
  np.testing.assert_allclose(packed[:, 4:], model(tokens[:, 4:])[0], atol=1e-5)
  for segment in model.stack.segments:
    for block in segment.blocks:
      table = block.attention.bias.relative_positions
      assert table[...].shape == (1, 32, 2)
      table[...] = table[...] + 3 * jnp.arange(32, dtype=jnp.float32)[None, :, None]
  assert np.abs(model(tokens)[0] - logits).max() > 1e-3


def test_other_positions_are_refused():
  with pytest.raises(ValueError, match="positions='learned' is not 'rotary' or 'relative'"):
    Decoder(*SIZES, positions='learned', rngs=nnx.Rngs(0))
