import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.transformer import Attention, rotation, visibility
from moejax.transformer.attention import attend


def attend_by_loops(q, k, v, allowed):
  """softmax(q k / sqrt(H)) v for one query at a time, in float64; allowed [B, S, S]."""
  y = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for b, s, n in np.ndindex(*q.shape[:3]):
    seen = np.flatnonzero(allowed[b, s])
    if seen.size:
      scores = k[b, seen, n // group].astype(np.float64) @ q[b, s, n] / np.sqrt(q.shape[3])
      weights = np.exp(scores - scores.max())
      y[b, s, n] = weights / weights.sum() @ v[b, seen, n // group]
  return y


def heads(rng, length, num_heads, num_kv_heads, head_dim=8, batch=2):
  return [
    jnp.asarray(rng.normal(size=(batch, length, n, head_dim)).astype(np.float32))
    for n in (num_heads, num_kv_heads, num_kv_heads)
  ]


@pytest.mark.parametrize('length', [1, 9])
@pytest.mark.parametrize('num_kv_heads', [4, 2, 1])
@pytest.mark.parametrize('causal', [True, False])
def test_attention_equals_a_loop_over_queries(length, num_kv_heads, causal, rng):
  q, k, v = heads(rng, length, 4, num_kv_heads)
  allowed = np.tri(length, dtype=bool) if causal else np.ones((length, length), bool)
  expected = attend_by_loops(*map(np.asarray, (q, k, v)), np.stack([allowed] * 2))
  np.testing.assert_allclose(attend(q, k, v, None, causal=causal), expected, atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_documents_and_padding_are_hidden_and_blind_rows_are_zero(causal, rng):
  length = 9
  q, k, v = heads(rng, length, 4, 2)
  segments = np.sort(rng.integers(0, 3, size=(2, length)), axis=1).astype(np.int32)
  mask = rng.random((2, length)) < 0.6
  mask[0, :3] = False  # on the left: causal rows that may attend to nothing
  visible = visibility(jnp.asarray(segments), jnp.asarray(mask), causal=causal)
  allowed = (segments[:, :, None] == segments[:, None, :]) & mask[:, None, :]
  allowed &= np.tri(length, dtype=bool) if causal else True
  expected = attend_by_loops(*map(np.asarray, (q, k, v)), allowed)
  np.testing.assert_allclose(attend(q, k, v, visible, causal=causal), expected, atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_a_sequence_of_nothing_but_padding_has_zero_output_and_finite_gradients(causal, rng):
  q, k, v = heads(rng, 6, 2, 2)
  visible = visibility(None, jnp.zeros((2, 6), bool), causal=causal)

  def total(q, k, v):
    return jnp.sum(attend(q, k, v, visible, causal=causal))

  assert total(q, k, v) == 0
  for gradient in jax.grad(total, argnums=(0, 1, 2))(q, k, v):
    np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize('length', [128, 300, 1100])  # in 1, 3 and 5 pieces, the last not whole
def test_pieces_give_what_all_scores_at_once_give_and_its_gradients(length, rng):
  q, k, v = heads(rng, length, 4, 2)
  segments = np.sort(rng.integers(0, 3, size=(2, length)), axis=1).astype(np.int32)
  mask = rng.random((2, length)) < 0.9
  mask[0, :3] = False
  visible = visibility(jnp.asarray(segments), jnp.asarray(mask), causal=True)
  bias = jnp.asarray(rng.normal(size=(4, length, length)).astype(np.float32))
  weight = jnp.asarray(rng.normal(size=q.shape).astype(np.float32))

  def run(implementation):
    def total(q, k, v, bias):
      y = attend(q, k, v, visible, causal=True, bias=bias, implementation=implementation)
      return jnp.vdot(y, weight), y

    return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, bias)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run('pieces'), run(None))


def test_eight_pieces_have_nine_sixteenths_of_the_work():
  def flops(implementation):
    run = functools.partial(attend, visible=None, causal=True, implementation=implementation)
    return jax.jit(run).lower(*[jnp.zeros((1, 1024, 2, 64))] * 3).cost_analysis()['flops']

  np.testing.assert_allclose(flops('pieces') / flops(None), 9 / 16, rtol=0.01)


def test_grouped_query_attention_equals_multi_head_attention_with_repeated_heads(rng):
  grouped = Attention(16, 4, 2, 8, causal=True, rngs=nnx.Rngs(0))
  full = Attention(16, 4, 4, 8, causal=True, rngs=nnx.Rngs(1))
  repeat = lambda w: jnp.repeat(w[...].reshape(16, 2, 8), 2, axis=1).reshape(16, 32)
  full.query.weight[...], full.out.weight[...] = grouped.query.weight[...], grouped.out.weight[...]
  full.key.weight[...], full.value.weight[...] = map(
    repeat, (grouped.key.weight, grouped.value.weight)
  )
  x = jnp.asarray(rng.normal(size=(2, 7, 16)).astype(np.float32))
  turn = rotation(jnp.arange(7, dtype=jnp.int32)[None, :], 8)
  np.testing.assert_allclose(grouped(x, turn), full(x, turn), atol=1e-6)


def test_query_and_key_norm_make_the_output_blind_to_their_size(rng):
  layer = Attention(16, 2, 2, 8, causal=True, qk_norm=True, rngs=nnx.Rngs(0))
  x = jnp.asarray(rng.normal(size=(1, 5, 16)).astype(np.float32))
  before = layer(x)
  layer.query.weight[...] = 10 * layer.query.weight[...]
  layer.key.weight[...] = 0.5 * layer.key.weight[...]
  np.testing.assert_allclose(layer(x), before, atol=1e-4)
  layer.query_norm.scale[...] = 3 * layer.query_norm.scale[...]
  assert np.abs(layer(x) - before).max() > 1e-3


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='num_kv_heads=3 does not divide num_heads=4'):
    Attention(16, 4, 3, 4, causal=True, rngs=nnx.Rngs(0))


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="implementation='flash' is not None, 'cudnn' or 'pieces'"):
    Attention(16, 4, 2, 4, causal=True, implementation='flash', rngs=nnx.Rngs(0))
