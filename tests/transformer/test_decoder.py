import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moejax.transformer import Decoder, Encoder
from moejax.transformer.decoder import layer_kinds

V = 20
SIZES = (V, 16, 2, 2, 24)


def make_tokens(rng, batch, length):
  return jnp.asarray(rng.integers(0, V, size=(batch, length)), dtype=jnp.int32)


def test_a_later_token_does_not_change_earlier_logits(toy_moe, rng):
  model = Decoder(*SIZES, moe=toy_moe(16), moe_layers=(1,), rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 2, 7)
  before, stats = model(tokens)
  after, _ = model(tokens.at[:, 5].set((tokens[:, 5] + 1) % V))
  assert before.shape == (2, 7, V)
  assert before.dtype == jnp.float32
  assert stats.prob_e.shape == (1, 3)
  np.testing.assert_array_equal(after[:, :5], before[:, :5])
  assert np.abs(after - before)[:, 5:].max(axis=-1).min() > 1e-5


def test_in_an_encoder_a_later_token_changes_every_logit(rng):
  model = Encoder(*SIZES, rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 2, 7)
  before, after = model(tokens)[0], model(tokens.at[:, 5].set((tokens[:, 5] + 1) % V))[0]
  assert np.abs(after - before).max(axis=-1).min() > 1e-5


@pytest.mark.parametrize('make', [Decoder, Encoder])
def test_packed_documents_have_the_logits_of_separate_ones(make, toy_moe, rng):
  model = make(*SIZES, moe=toy_moe(16), moe_layers=(0,), rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 1, 11)
  segments = jnp.array([[1] * 4 + [2] * 7], dtype=jnp.int32)
  packed = model(tokens, segment_ids=segments)[0]
  separate = [model(tokens[:, :4])[0], model(tokens[:, 4:])[0]]
  np.testing.assert_allclose(packed, jnp.concatenate(separate, axis=1), atol=1e-5)
  assert np.abs(model(tokens)[0] - packed)[:, 4:].max() > 1e-4


@pytest.mark.parametrize('make', [Decoder, Encoder])
def test_padding_changes_no_real_logit_and_is_not_counted(make, toy_moe, rng):
  model = make(*SIZES, moe=toy_moe(16), moe_layers=(0, 1), rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 2, 9)
  short, stats_short = model(tokens[:, :6])
  mask = jnp.broadcast_to(jnp.arange(9)[None, :] < 6, (2, 9))
  padded, stats = model(tokens, mask=mask)
  np.testing.assert_allclose(padded[:, :6], short, atol=1e-5)
  np.testing.assert_allclose(stats.tokens, [12, 12])
  np.testing.assert_allclose(stats.prob_e, stats_short.prob_e, atol=1e-5)


def test_shifting_all_positions_changes_nothing_and_stretching_them_does(rng):
  model = Decoder(*SIZES, rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 1, 8)
  positions = jnp.arange(8, dtype=jnp.int32)[None, :]
  plain = model(tokens)[0]
  np.testing.assert_allclose(model(tokens, positions=positions + 100)[0], plain, atol=1e-5)
  assert np.abs(model(tokens, positions=3 * positions)[0] - plain).max() > 1e-4


def test_tied_logits_are_products_with_the_embedding_table(rng):
  tokens = make_tokens(rng, 1, 5)
  tied = Decoder(*SIZES, rngs=nnx.Rngs(0))
  features, _ = tied.features(tokens)
  np.testing.assert_allclose(tied(tokens)[0], features @ tied.embed.weight[...].T, atol=1e-6)
  assert tied.head is None
  untied = Decoder(*SIZES, tie_embeddings=False, rngs=nnx.Rngs(0))
  features, _ = untied.features(tokens)
  np.testing.assert_allclose(untied(tokens)[0], features @ untied.head.weight[...], atol=1e-6)


def test_bfloat16_keeps_float32_parameters_and_follows_float32(toy_moe, rng):
  tokens = make_tokens(rng, 2, 8)
  options = dict(moe=toy_moe(16), moe_layers=(1,), qk_norm=True)
  wide = Decoder(*SIZES, **options, rngs=nnx.Rngs(0))
  narrow = Decoder(*SIZES, **options, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(narrow))} == {jnp.dtype('float32')}
  graph, params, rest = nnx.split(narrow, nnx.Param, ...)

  def loss(params):
    logits, _ = nnx.merge(graph, params, rest)(tokens)
    return jnp.mean(jnp.square(logits)), logits

  gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, wide(tokens)[0], atol=0.03)
  for leaf in jax.tree.leaves(gradients):
    assert leaf.dtype == jnp.float32
    assert np.isfinite(leaf).all()


@pytest.mark.usefixtures('x64')
def test_float64_gradients_agree_with_finite_differences(rng):
  model = Decoder(*SIZES, qk_norm=True, dtype=jnp.float64, rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 1, 6)
  graph, params = nnx.split(model)
  direction = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)

  @jax.jit
  def loss(params):
    return jnp.sum(jnp.sin(3 * nnx.merge(graph, params)(tokens)[0]))

  slope = sum(
    jnp.sum(a * b)
    for a, b in zip(
      jax.tree.leaves(jax.grad(loss)(params)), jax.tree.leaves(direction), strict=True
    )
  )
  step = 1e-6
  shifted = [jax.tree.map(lambda p, d, s=s: p + s * d, params, direction) for s in (step, -step)]
  assert shifted[0]['embed']['weight'][...].dtype == jnp.float64
  np.testing.assert_allclose(slope, (loss(shifted[0]) - loss(shifted[1])) / (2 * step), rtol=1e-5)


@pytest.mark.usefixtures('standard_promotion')
def test_a_few_adam_steps_memorise_two_sequences(toy_moe, rng):
  model = Decoder(*SIZES, moe=toy_moe(16), moe_layers=(1,), remat='full', rngs=nnx.Rngs(0))
  tokens = make_tokens(rng, 2, 10)
  graph, params, rest = nnx.split(model, nnx.Param, ...)
  optimizer = optax.adam(1e-2)

  def loss(params):
    logits, _ = nnx.merge(graph, params, rest)(tokens[:, :-1])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

  @jax.jit
  def step(params, state):
    value, gradients = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, value

  state, losses = optimizer.init(params), []
  for _ in range(50):
    params, state, value = step(params, state)
    losses.append(float(value))
  assert losses[0] == pytest.approx(np.log(V), rel=0.1)
  assert losses[-1] < 0.5


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(moe_layers=(1,)), 'moe=None'),
    (dict(num_kv_heads=3), 'num_kv_heads=3 does not divide num_heads=2'),
    (dict(activation='tanh'), "activation='tanh'"),
  ],
)
def test_settings_that_do_not_fit_are_refused_in_a_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    Decoder(*SIZES, **options, rngs=nnx.Rngs(0))


def test_heads_that_do_not_divide_the_width_are_refused_unless_their_width_is_given():
  with pytest.raises(ValueError, match='num_heads=3 does not divide d_model=16'):
    Decoder(V, 16, 1, 3, 24, rngs=nnx.Rngs(0))
  model = Decoder(V, 16, 1, 3, 24, head_dim=4, rngs=nnx.Rngs(0))
  assert model.stack.segments[0].blocks[0].attention.query.weight[...].shape == (1, 16, 12)


def test_a_moe_layer_that_does_not_exist_is_refused(toy_moe):
  with pytest.raises(ValueError, match='layer 2 of num_layers=2'):
    Decoder(*SIZES, moe=toy_moe(16), moe_layers=(2,), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ('layers', 'message'),
  [((1, 4), 'names layer 4 of num_layers=4'), ((1, 1), 'names a layer twice')],
)
def test_layers_that_do_not_exist_or_stand_twice_are_refused(layers, message):
  with pytest.raises(ValueError, match=message):
    layer_kinds(4, object, layers)
