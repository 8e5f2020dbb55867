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
