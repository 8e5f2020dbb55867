"""Losses of single tokens and of clusters, with published values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Context
from moejax.moe import losses
from moejax.moe.stats import routing_stats
from moejax.routers import weighting
from moejax.routers.affinity import TokenAffinity
from moejax.routers.top_k import TopKAssign
from tests.routers.table import H


def stats_of(prob_e, clusters=1):
  """One token with these probabilities, on the first expert."""
  prob_e = jnp.array(prob_e)
  logits = jnp.log(jnp.maximum(prob_e, 1e-30))[None, None]
  scores = TokenAffinity('softmax', 1)(logits, None, None, Context())
  plan = TopKAssign(1, weighting.raw)(scores, Context())
  stats = routing_stats(scores, plan, Context())
  return losses.RoutingStats(**(vars(stats) | {'clusters': clusters}))


def test_variances_of_clusters():
  """me = (0.4, 0.2, 0.3, 0.1); the library multiplies by E, as the paper's loss does."""
  me = [0.4, 0.2, 0.3, 0.1]
  assert float(losses.cluster_variance(stats_of(me))) / 4 == pytest.approx(0.016667, abs=1e-6)
  two = stats_of(me, clusters=2)
  assert float(losses.cluster_variance(two)) / 4 == pytest.approx(0.02, abs=1e-6)
  assert float(losses.cluster_contrast(two)) / 4 == pytest.approx(0.016375, abs=1e-6)
  assert float(losses.cluster_variance(stats_of([0.3, 0.3, 0.2, 0.2], 2))) == pytest.approx(
    0, abs=1e-7
  )


def test_sparsity_of_one_token():
  assert float(losses.sparsity(stats_of([0.7, 0.2, 0.1, 0.0]))) == pytest.approx(1.360828, abs=1e-6)
  assert float(losses.sparsity(stats_of([0.25] * 4))) == pytest.approx(2, abs=1e-6)


def test_balance_of_clusters_of_one_is_balance():
  scores = TokenAffinity('softmax', 2)(H[None], None, None, Context())
  stats = routing_stats(scores, TopKAssign(2, weighting.raw)(scores, Context()), Context())
  single = losses.RoutingStats(**(vars(stats) | {'clusters': 4}))
  assert float(losses.cluster_balance(single)) == pytest.approx(1.279980, abs=1e-6)
  assert float(losses.member_balance(stats)) == pytest.approx(1.279980, abs=1e-6)
  assert float(losses.load_concentration(stats)) == pytest.approx(1.238152, abs=1e-6)
  mean = np.array([0.452471, 0.297432, 0.137762, 0.112336])
  assert float(losses.importance_square(stats)) == pytest.approx(4 * (mean**2).sum(), abs=1e-5)


@pytest.mark.parametrize('name', losses.LOSSES)
@pytest.mark.parametrize(
  ('affinity', 'logits'),
  [
    ('softmax', [[0.0, -200.0, -150.0, -300.0], [0.0, -1.0, -1e9, -500.0]]),
    ('sigmoid', [[-200.0, -150.0, -300.0, -250.0], [0.0, -200.0, 100.0, 1.0]]),
  ],
)
def test_a_certain_router_has_finite_losses_and_gradients(affinity, logits, name):
  """Probabilities that have come to 0: of single tokens, of an expert in the whole batch, of all of a token."""

  def loss(logits_bse):
    scores = TokenAffinity(affinity, 1)(logits_bse, None, None, Context())
    plan = TopKAssign(1, weighting.raw)(scores, Context())
    return losses.LOSSES[name](routing_stats(scores, plan, Context()))

  value, gradient = jax.value_and_grad(loss)(jnp.array(logits)[None])
  assert jnp.isfinite(value)
  assert jnp.isfinite(gradient).all()
