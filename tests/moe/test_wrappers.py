"""Layers made of mixtures: sub-tokens (MH-MoE), two mixtures in a row (CartesianMoE)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, oracle
from moejax.moe import losses
from moejax.moe.cartesian import CartesianMoE
from moejax.moe.multi_head import MultiHeadMoE, repeat_positions

D = 8


def tokens(shape=(2, 5, D)):
  return jax.random.normal(jax.random.key(1), shape)


def check_tree_close(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def gradients(f, layer, x):
  graph, state = nnx.split(layer)
  target = jax.random.normal(jax.random.key(3), x.shape)
  loss = lambda state, x: (f(nnx.merge(graph, state), x) * target).sum()
  return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)


def multi_head(**options):
  layer = MultiHeadMoE(D, 6, 4, **({'heads': 4} | options), rngs=nnx.Rngs(0))
  layer.split.bias[...] = 0.1 * jnp.arange(D, dtype=jnp.float32)
  layer.merge.bias[...] = 0.3 * jnp.ones(D)
  return layer


def test_sub_tokens_are_routed_apart_and_put_together_in_order():
  """Value and gradient of the definition: cut by slices, each part through the oracle, then concatenated."""

  def by_parts(layer, x):
    wide = x @ layer.split.weight[...] + layer.split.bias[...][None, None]
    sub = jnp.stack([wide[..., 2 * h : 2 * h + 2] for h in range(4)], 2)  # [B, S, heads, 2]
    flat = sub.reshape(2, 20, 2)
    y = oracle.moe(flat, layer.moe.router(flat), layer.moe.experts).reshape(2, 5, 4, 2)
    joined = jnp.concatenate([y[:, :, h] for h in range(4)], -1)
    return joined @ layer.merge.weight[...] + layer.merge.bias[...][None, None]

  layer, x = multi_head(), tokens()
  check_tree_close(gradients(lambda layer, x: layer(x)[0], layer, x), gradients(by_parts, layer, x))
  stats = layer(x)[1].stats
  assert float(stats.tokens) == 2 * 5 * 4
  assert float(stats.chosen_e.sum()) == 2 * 5 * 4 * 2


def test_one_head_and_identities_are_the_plain_layer():
  layer = multi_head(heads=1)
  for linear in (layer.split, layer.merge):
    linear.weight[...] = jnp.eye(D)
    linear.bias[...] = jnp.zeros(D)
  x = tokens()
  np.testing.assert_allclose(layer(x)[0], layer.moe(x)[0], atol=1e-6)


def test_positions_repeat_with_their_sub_tokens():
  context = Context(
    mask=jnp.array([[True, False]]), token_ids=jnp.array([[7, 8]]), positions=jnp.array([[0, 1]])
  )
  repeated = repeat_positions(context, 3)
  assert repeated.mask.tolist() == [[True] * 3 + [False] * 3]
  assert repeated.token_ids.tolist() == [[7, 7, 7, 8, 8, 8]]
  assert repeated.positions.tolist() == [[0, 0, 0, 1, 1, 1]]


def cartesian(num_experts=4, **options):
  return CartesianMoE(D, 12, num_experts, **options, rngs=nnx.Rngs(0))


def test_two_mixtures_in_a_row_by_definition():
  def by_parts(layer, x):
    a = oracle.moe(x, layer.first.router(x), layer.first.experts)
    a = a + layer.first.shared.expert(0)(x)
    r = x + a
    h = r / jnp.sqrt((r * r).mean(-1, keepdims=True) + 1e-6) * layer.norm.scale[...][None, None]
    b = oracle.moe(h, layer.second.router(h), layer.second.experts)
    return a + b + layer.second.shared.expert(0)(h)

  layer, x = cartesian(num_shared=1), tokens()
  assert layer.first.experts.w_up.shape == (4, D, 6)
  check_tree_close(gradients(lambda layer, x: layer(x)[0], layer, x), gradients(by_parts, layer, x))


def test_one_sub_expert_each_is_two_dense_layers():
  layer, x = cartesian(1, router={'name': 'top_k', 'k': 1}), tokens()
  a = layer.first.experts.expert(0)(x)
  want = a + layer.second.experts.expert(0)(layer.norm(x + a))
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_losses_of_two_mixtures_are_the_sum():
  layer, x = cartesian(losses={'balance': 1.0, 'z': 1.0}), tokens()
  aux = layer(x)[1]
  a, first = layer.first(x)
  _, second = layer.second(layer.norm(x + a))
  for name, value in aux.losses.items():
    want = sum(float(losses.LOSSES[name](one.stats)) for one in (first, second))
    assert float(value) == pytest.approx(want, rel=1e-5)
  assert aux.metrics['load'].shape == (8,)
  assert float(aux.stats.tokens) == 10


def test_clusters_of_two_mixtures_stay_apart():
  """Two nodes in either mixture: the loss between nodes is the sum of the two, not one between the mixtures."""
  router = {'name': 'smile', 'nodes': 2}
  layer, x = cartesian(router=router, losses={'cluster_balance': 1.0}), tokens()
  layer.first.router.scorer.kernel[...] = jax.random.normal(jax.random.key(2), (D, 4))
  aux = layer(x)[1]
  a, first = layer.first(x)
  _, second = layer.second(layer.norm(x + a))
  parts = [float(losses.cluster_balance(one.stats)) for one in (first, second)]
  assert parts[0] != pytest.approx(parts[1], abs=1e-3)
  assert float(aux.losses['cluster_balance']) == pytest.approx(sum(parts), rel=1e-5)


def test_tokens_that_no_expert_works_on_are_counted_once():
  """No probability is above the threshold: all tokens pass by both mixtures, and they are all there are."""
  layer = cartesian(router={'name': 'ds_moe', 'eval_threshold': 0.99})
  metrics = layer(tokens())[1].metrics
  assert float(metrics['unrouted']) == 1


def test_sub_tokens_hear_what_their_position_does():
  """One embedding for every position, alike in the whole sequence, is one for the sequence."""
  layer = MultiHeadMoE(D, 6, 4, {'name': 'speech_moe', 'width': 3}, heads=2, rngs=nnx.Rngs(0))
  heard = jax.random.normal(jax.random.key(4), (2, 3))
  everywhere = jnp.broadcast_to(heard[:, None], (2, 5, 3))
  want = layer(tokens(), Context(domain=heard))[0]
  np.testing.assert_allclose(layer(tokens(), Context(domain=everywhere))[0], want, atol=1e-6)
  parts = repeat_positions(Context(domain=everywhere.at[0, 1].set(7.0)), 2)
  assert (parts.domain[0, :, 0] == 7.0).tolist() == [False] * 2 + [True] * 2 + [False] * 6


@pytest.mark.parametrize('make', [multi_head, cartesian], ids=['multi_head', 'cartesian'])
def test_wrappers_keep_padding_out_and_tokens_apart(make):
  layer, x = make(), tokens()
  mask = jnp.array([[True] * 5, [True] * 3 + [False] * 2])
  dirty = jnp.where(mask[..., None], x, jnp.nan)
  y, aux = layer(dirty, Context(mask=mask))
  np.testing.assert_allclose(y[0], layer(x)[0][0], atol=1e-6)
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, aux)))
  changed = layer(x.at[0, 3:].set(5.0).at[1].set(-2.0))[0]
  np.testing.assert_allclose(changed[0, :3], layer(x)[0][0, :3], atol=1e-6)


def test_bad_sizes_are_refused_in_one_sentence():
  with pytest.raises(ValueError, match='heads=3 does not divide d_model=8'):
    multi_head(heads=3)
  with pytest.raises(ValueError, match='d_ff=7: accepted are even integers'):
    CartesianMoE(D, 7, 4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='num_experts=0'):
    MoE(D, 6, 0, rngs=nnx.Rngs(0))
