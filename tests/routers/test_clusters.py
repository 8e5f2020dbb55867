"""Experts in nodes, blocks and clusters: SMILE, LocMoE, MoEC."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, make_router
from moejax.moe import losses
from moejax.moe.stats import routing_stats
from tests.routers.table import D, make, tokens


def test_bilevel_probabilities_are_products_and_the_joint_choice_is_the_two_choices():
  router, x = make('smile', 6, nodes=3), tokens()
  scores = router.scores(x, Context())
  both = x @ router.scorer.kernel[...]
  node, member = jax.nn.softmax(both[..., :3], -1), jax.nn.softmax(both[..., 3:], -1)
  want = (node[..., :, None] * member[..., None, :]).reshape(2, 6, 6)
  np.testing.assert_allclose(scores.probs, want, rtol=1e-5)
  np.testing.assert_allclose(jax.nn.softmax(scores.logits, -1), want, rtol=1e-5)
  np.testing.assert_allclose(scores.partition, jax.nn.logsumexp(scores.logits, -1), rtol=1e-5)
  plan = router(x)
  choice = plan.expert.reshape(2, 6)
  np.testing.assert_array_equal(choice, node.argmax(-1) * 2 + member.argmax(-1))
  np.testing.assert_allclose(plan.weight.reshape(2, 6), node.max(-1) * member.max(-1), rtol=1e-5)


@pytest.mark.parametrize('nodes', [1, 4])
def test_one_level_alone_is_switch(nodes):
  """With one node the first column of the kernel shifts all logits; with one member the last does."""
  router, plain = make('smile', 4, nodes=nodes), make('top_k', 4, k=1)
  kernel = router.scorer.kernel[...]
  plain.scorer.kernel[...] = kernel[:, 1:] if nodes == 1 else kernel[:, :4]
  plan, want = router(tokens()), plain(tokens())
  np.testing.assert_array_equal(plan.expert, want.expert)
  np.testing.assert_allclose(plan.weight, want.weight, rtol=1e-5)


def test_the_two_losses_of_two_levels():
  """Four experts in two nodes; all tokens at node 0, evenly on its members: between nodes collapsed, within even."""
  router = make('smile', 4, nodes=2)
  kernel = router.scorer.kernel
  kernel[...] = 50.0 * jnp.eye(D, 4)  # features: node 0, node 1, member 0, member 1
  x = jnp.zeros((1, 4, D)).at[0, :, 0].set(1).at[0, :2, 2].set(1).at[0, 2:, 3].set(1)
  scores, plan = router.route(x, Context())
  stats = routing_stats(scores, plan, Context())
  assert float(losses.cluster_balance(stats)) == pytest.approx(2, rel=1e-5)
  assert float(losses.member_balance(stats)) == pytest.approx(1, rel=1e-5)


def test_the_block_mean_gate():
  """x = (1, 3, -2, 0), two experts: block means (2, -1), softmax of (2, 0)."""
  router = make_router('locmoe', d_model=4, num_experts=2, rngs=nnx.Rngs(0))
  x = jnp.array([[[1.0, 3.0, -2.0, 0.0]]])
  scores = router.scores(x, Context())
  np.testing.assert_allclose(scores.logits[0, 0], [2, 0], atol=1e-6)
  np.testing.assert_allclose(scores.probs[0, 0], [0.880797, 0.119203], atol=1e-6)
  plan = router(x)
  assert plan.expert.tolist() == [0]
  assert not jax.tree.leaves(nnx.split(router)[1])


def locality_of(x, nodes=2, mask=None):
  router = make_router('locmoe', d_model=4, num_experts=4, rngs=nnx.Rngs(0), nodes=nodes)
  context = Context(mask=mask)
  return losses.locality(routing_stats(*router.route(x, context), context))


def test_locality_is_the_divergence_of_the_fully_local_distribution():
  """Four sequences, two nodes: the first two sequences are at home with experts 0 and 1, the last two with 2 and 3.

  Block means (log 6, 0, 0, log 2) are probabilities (6, 1, 1, 2) / 10: 7 / 10 for node 0 and 3 / 10 for node 1.
  """
  x = jnp.log(jnp.array([6.0, 1.0, 1.0, 2.0]))
  flipped = x[::-1]
  here, away = -np.log(0.7), -np.log(0.3)
  same = jnp.broadcast_to(x, (4, 3, 4))
  assert float(locality_of(same)) == pytest.approx((here + away) / 2, rel=1e-5)
  apart = same.at[2:].set(flipped)
  assert float(locality_of(apart)) == pytest.approx(here, rel=1e-5)
  assert float(locality_of(apart[::-1])) == pytest.approx(away, rel=1e-5)
  certain = jnp.zeros((4, 3, 4)).at[:2, :, 0].set(100).at[2:, :, 3].set(100)
  assert float(locality_of(certain)) == pytest.approx(0, abs=1e-6)
  assert float(locality_of(jnp.zeros((4, 3, 4)))) == pytest.approx(np.log(2), rel=1e-5)
  assert float(locality_of(same, nodes=1)) == 0


def test_locality_is_of_whole_homes_and_of_real_tokens():
  """The mean probability of a home counts, not that of each token; padding counts nowhere."""
  x = jnp.zeros((2, 2, 4)).at[0, 0].set(jnp.log(jnp.array([6.0, 1.0, 1.0, 2.0])))
  mask = jnp.array([[True, True], [True, False]])
  want = -(2 * np.log((0.7 + 0.5) / 2) + np.log(0.5)) / 3
  assert float(locality_of(x, mask=mask)) == pytest.approx(want, rel=1e-5)


def test_locality_draws_tokens_home():
  """Its gradient is that of its definition, and a step against it raises what a home's experts get."""
  x = jnp.abs(tokens((4, 3, 4))) + 0.1

  def by_definition(x):
    probs = jax.nn.softmax(x, -1)
    first, last = probs[:2, :, :2].sum(-1).mean(), probs[2:, :, 2:].sum(-1).mean()
    return -(jnp.log(first) + jnp.log(last)) / 2

  value, gradient = jax.value_and_grad(locality_of)(x)
  want, want_gradient = jax.value_and_grad(by_definition)(x)
  assert float(value) == pytest.approx(float(want), rel=1e-5)
  np.testing.assert_allclose(gradient, want_gradient, atol=1e-6)
  assert (gradient[:2, :, :2] < 0).all()
  assert (gradient[2:, :, 2:] < 0).all()
  assert float(locality_of(x - gradient)) < float(value)


def test_nodes_that_do_not_divide_the_experts_are_refused():
  with pytest.raises(ValueError, match='nodes=3 does not divide num_experts=4'):
    make('locmoe', 4, nodes=3)


def test_dropped_experts_of_a_cluster_take_no_tokens_in_training():
  """Eight experts in two clusters, half of each dropped; who survives changes with the progress of training only."""
  router, x = make('moec', 8, clusters=2, resamples=10), tokens((4, 64, D))
  used = {}
  for progress in (0.0, 0.05, 0.3, 0.9):
    survives = router.affinity.survivors(8, jnp.float32(progress))
    assert survives.reshape(2, 4).sum(1).tolist() == [2, 2]
    plan = router(x, Context(train=True, progress=jnp.float32(progress)))
    used[progress] = set(np.asarray(plan.expert).tolist())
    assert used[progress] <= set(np.flatnonzero(survives).tolist())
  assert used[0.0] == used[0.05]
  assert len({frozenset(experts) for experts in used.values()}) > 1
  assert len(set(np.asarray(router(x).expert).tolist())) > 4


def test_the_cosine_gate_sees_directions_only():
  router, x = make('moec', 4, dropout=0.0), tokens()
  logits = router.scores(x, Context()).logits
  np.testing.assert_allclose(router.scores(3 * x, Context()).logits, logits, rtol=1e-4, atol=1e-5)
  projected = np.asarray(x @ router.scorer.kernel[...], np.float64)
  phi = np.asarray(router.scorer.phi[...], np.float64)
  lengths = np.linalg.norm(projected, axis=-1, keepdims=True) * np.linalg.norm(phi, axis=0)
  np.testing.assert_allclose(logits, projected @ phi / lengths / 0.07, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    router(x).weight, 1 / (1 + np.exp(-np.asarray(logits).max(-1).reshape(-1))), rtol=1e-5
  )


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('moec', {'clusters': 3}, 'clusters=3 does not divide num_experts=4'),
    ('moec', {'dropout': 1.0}, 'dropout=1.0: accepted are numbers'),
    ('smile', {'nodes': 3}, 'nodes=3 does not divide num_experts=4'),
  ],
)
def test_bad_options_are_refused_in_one_sentence(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, **options)
