"""The layer's own options: granularity, shared experts, output norm, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, make_router

D = 8


def tokens(shape=(2, 6, D)):
  return jax.random.normal(jax.random.key(1), shape)


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.split(tree)[1]))


@pytest.mark.parametrize('granularity', [1, 2, 4, 8])
def test_granularity_keeps_parameters_and_active_work(granularity):
  """G * E experts of d_ff / G, k = G: only the router grows (Krajewski et al. 2024)."""
  layer = MoE(D, 32, 4, granularity=granularity, router={'name': 'top_k', 'k': 1}, rngs=nnx.Rngs(0))
  assert count(layer.experts) == 3 * 4 * D * 32
  assert layer.experts.w_up.shape == (4 * granularity, D, 32 // granularity)
  plan = layer.router(tokens())
  assert plan.token.size == 12 * granularity
  assert count(layer.router) == D * 4 * granularity
  router = {'name': 'expert_choice', 'capacity_factor': 1.0}
  chooser = MoE(D, 32, 4, router, granularity=granularity, rngs=nnx.Rngs(0))
  assert (
    chooser.router(tokens((2, 8, D))).token.size == 16 * granularity
  )  # T * G rows, T / E an expert


def test_default_k_of_a_granular_layer_is_the_granularity():
  layer = MoE(D, 32, 4, granularity=4, rngs=nnx.Rngs(0))
  assert layer.router(tokens()).token.size == 12 * 4


@pytest.mark.parametrize('gated', [True, False])
def test_fused_shared_experts_are_separate_ones(gated):
  layer = MoE(D, 16, 4, num_shared=2, gated=gated, rngs=nnx.Rngs(0))
  plain = MoE(D, 16, 4, gated=gated, rngs=nnx.Rngs(0))
  nnx.update(plain.experts, nnx.split(layer.experts)[1])
  nnx.update(plain.router, nnx.split(layer.router)[1])
  x = tokens()
  w_gate, w_up, w_down = (None if w is None else w[0] for w in layer.shared.weights())
  want = plain(x)[0]
  for part in (slice(0, 16), slice(16, 32)):
    up = x @ w_up[:, part]
    hidden = jax.nn.silu(up) if w_gate is None else jax.nn.silu(x @ w_gate[:, part]) * up
    want = want + hidden @ w_down[part]
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_without_routed_experts_the_shared_one_is_left():
  layer = MoE(D, 16, 4, num_shared=1, rngs=nnx.Rngs(0))
  nnx.update(layer.experts, jax.tree.map(jnp.zeros_like, nnx.split(layer.experts)[1]))
  np.testing.assert_allclose(layer(tokens())[0], layer.shared.expert(0)(tokens()), atol=1e-6)


def test_one_expert_is_a_dense_layer():
  layer = MoE(D, 16, 1, {'name': 'top_k', 'k': 1}, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(layer(tokens())[0], layer.experts.expert(0)(tokens()), atol=1e-6)


def test_output_norm_makes_rows_of_unit_mean_square():
  y, _ = MoE(D, 16, 4, output_norm=True, rngs=nnx.Rngs(0))(100 * tokens())
  np.testing.assert_allclose((y * y).mean(-1), 1, rtol=1e-3)


def test_losses_come_weighted_and_metrics_describe_the_call():
  layer = MoE(D, 16, 4, losses={'balance': 2.0, 'z': 0.5}, rngs=nnx.Rngs(0))
  double = MoE(D, 16, 4, losses={'balance': 4.0, 'z': 1.0}, rngs=nnx.Rngs(0))
  (_, one), (_, two) = layer(tokens()), double(tokens())
  assert set(one.losses) == {'balance', 'z'}
  for name, value in one.losses.items():
    np.testing.assert_allclose(two.losses[name], 2 * value, rtol=1e-6)
  assert float(one.metrics['load'].sum()) == pytest.approx(1)
  assert float(one.metrics['max_load']) == pytest.approx(4 * float(one.metrics['load'].max()))
  assert float(one.metrics['dropped']) == float(one.metrics['unrouted']) == 0


def test_drops_are_counted():
  """Capacity for half of the rows: 12 tokens, one choice, two experts with room for three each."""
  router = {'name': 'top_k', 'k': 1, 'capacity_factor': 0.5}
  _, aux = MoE(D, 16, 2, router, rngs=nnx.Rngs(0))(tokens())
  assert float(aux.stats.kept_e.max()) <= 3
  lost = 12 - float(aux.stats.kept_e.sum())
  assert lost >= 6
  assert float(aux.metrics['dropped']) == pytest.approx(lost / 12)
  assert float(aux.metrics['unrouted']) == pytest.approx(lost / 12)


def test_any_number_of_leading_axes():
  layer, x = MoE(D, 16, 4, rngs=nnx.Rngs(0)), tokens((2, 3, 6, D))
  y, _ = layer(x, Context(mask=jnp.ones((2, 3, 6), bool)))
  np.testing.assert_allclose(y[1, 2], layer(x[1, 2])[0], atol=1e-6)


def test_a_router_of_ones_own_is_taken_as_it_is():
  router = make_router('top_k', d_model=D, num_experts=4, rngs=nnx.Rngs(5), k=3)
  assert MoE(D, 16, 4, router, rngs=nnx.Rngs(0)).router is router


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'d_ff': 0}, 'd_ff=0: accepted are integers from 1'),
    ({'num_shared': -1}, 'num_shared=-1: accepted are integers from 0'),
    ({'granularity': 3}, 'granularity=3 does not divide d_ff=16'),
    ({'granularity': 2, 'router': 'switch'}, "granularity=2 with router 'switch'"),
    ({'router': {'name': 'top_k', 'k': 5}}, 'k=5 with num_experts=4: accepted are 1 to 4'),
    ({'router': 'top-k'}, "router name='top-k': accepted are .* did you mean 'top_k'"),
    ({'router': {'name': 'soft', 'k': 2}}, "option 'k' of router 'soft': accepted are slots"),
    ({'losses': {'ballance': 1.0}}, "loss 'ballance': accepted are balance"),
    ({'activation': 'swish'}, "activation='swish': accepted are"),
  ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
  sizes = {'d_model': D, 'd_ff': 16, 'num_experts': 4} | options
  with pytest.raises(ValueError, match=message):
    MoE(**sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('top_k', {'k': 1, 'weighting': 'softmax_topk_norm'}, "the router's gradient zero"),
    ('top_k', {'weighting': 'softmax'}, "weighting='softmax': accepted are 'softmax_topk'"),
    ('top_k', {'capacity_factor': -1.0}, 'capacity_factor=-1.0: accepted are positive numbers'),
    ('top_k', {'priority': 'best'}, "priority='best': accepted are 'token_major'"),
    ('top_k', {'k': 3, 'second_policy': 'none'}, "second_policy='none' with k=3"),
    ('top_k', {'eval_capacity_factor': 0.5}, 'eval_capacity_factor=0.5 without capacity_factor'),
    ('top_k', {'renorm_after_drop': True}, 'renorm_after_drop=True with k=2, capacity_factor=None'),
    ('switch', {'renorm_after_drop': True}, 'renorm_after_drop=True with k=1, .*gradient zero'),
    ('expert_choice', {'group': 'token'}, "group='token': accepted are 'sequence'"),
    ('expert_choice', {'cap': 1}, 'cap=1: accepted are capacity_factor=2.0 to 4'),
    ('soft', {'slots': 0}, 'slots=0: accepted are integers from 1'),
  ],
)
def test_bad_router_options_are_refused_in_one_sentence(name, options, message):
  with pytest.raises(ValueError, match=message):
    make_router(name, d_model=D, num_experts=4, rngs=nnx.Rngs(0), **options)


def test_noise_without_a_key_and_wrong_masks_are_refused():
  layer = MoE(D, 16, 4, {'name': 'top_k', 'noise_std': 1.0}, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='noise_std=1.0, jitter=0.0 need context.rng in training'):
    layer(tokens(), Context(train=True))
  with pytest.raises(ValueError, match=r'context.mask of shape \(2, 5\): expected \(2, 6\)'):
    layer(tokens(), Context(mask=jnp.ones((2, 5), bool)))


@pytest.mark.parametrize('name', ['switch', 'gshard'])
def test_presets_that_drop_nothing_in_training_drop_nothing_in_evaluation(name):
  """All tokens are one, so that a capacity would show."""
  router = make_router(name, d_model=D, num_experts=4, rngs=nnx.Rngs(0), capacity_factor=None)
  rows = router(jnp.ones((2, 12, D)))
  np.testing.assert_array_equal(rows.expert, rows.chosen)
