"""Null experts: golden values of the table, and what they leave unchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE
from moejax.moe import losses
from moejax.moe.stats import routing_stats
from moejax.routers import weighting
from moejax.routers.ada_moe import NullAffinity, NullAssign
from moejax.routers.affinity import TokenAffinity
from moejax.routers.top_k import TopKAssign
from tests.routers.table import D, H, make, tokens


def ada(logits, k=2, nulls=2):
  scores = NullAffinity(k, nulls)(logits[None], None, None, Context())
  plan = NullAssign(k)(scores, Context())
  return plan, routing_stats(scores, plan, Context())


def test_null_experts_take_weight_from_nobody():
  """Experts 0 and 1 are true, 2 and 3 null."""
  plan, stats = ada(H)
  assert plan.num_experts == 4
  weight, expert = plan.weight.reshape(6, 2), plan.expert.reshape(6, 2)
  np.testing.assert_allclose(weight[0], [0.731059, 0.268941], atol=1e-6)
  np.testing.assert_array_equal(expert[3], [0, 2])
  np.testing.assert_allclose(weight[3], [1, 0], atol=1e-6)
  np.testing.assert_array_equal(weight[5], [0, 0])
  np.testing.assert_allclose(stats.kept_e / 12, [0.416667, 0.333333, 0.166667, 0.083333], atol=1e-6)
  np.testing.assert_allclose(stats.chosen_e / 12, [0.416667, 0.333333, 0.125, 0.125], atol=1e-6)
  assert float(losses.balance(stats)) == pytest.approx(1.275742, abs=1e-6)


def test_which_null_expert_is_chosen_changes_nothing():
  plan, stats = ada(H)
  other_plan, other = ada(H[:, jnp.array([0, 1, 3, 2])])
  assert float(losses.balance(other)) == pytest.approx(float(losses.balance(stats)), rel=1e-6)
  np.testing.assert_allclose(other_plan.weight, plan.weight, rtol=1e-6)


def test_without_null_choices_it_is_normalised_top_k():
  far = jnp.concatenate([H, jnp.full((6, 3), -50.0)], 1)
  plan, _ = ada(far, k=2, nulls=3)
  scores = TokenAffinity('softmax', 2)(H[None], None, None, Context())
  want = TopKAssign(2, weighting.normalised)(scores, Context())
  np.testing.assert_array_equal(plan.expert, want.expert)
  np.testing.assert_allclose(plan.weight, want.weight, atol=1e-6)


def test_a_token_with_null_experts_alone_passes_unharmed():
  """Output zero, gradients finite."""

  def output(logits):
    return ada(logits)[0].weight.sum()

  gradient = jax.grad(output)(H)
  assert bool(jnp.isfinite(gradient).all())
  assert float(output(H[5:])) == 0
  layer = MoE(D, 6, 4, {'name': 'ada_moe', 'k': 2, 'nulls': 4}, rngs=nnx.Rngs(0))
  kernel = layer.router.scorer.kernel
  kernel[...] = jnp.zeros_like(kernel[...]).at[:, 4:].set(1.0)
  y, aux = layer(jnp.abs(tokens()))
  assert float(jnp.abs(y).max()) == 0
  assert aux.stats.kept_e[:4].tolist() == [0] * 4
  assert aux.metrics['load'].shape == (8,)


def test_the_balance_loss_brings_the_mean_number_of_true_experts():
  """E = m = 4, k = 4: two of four choices are true once the loss has been followed."""
  router, x = make('ada_moe', k=4, nulls=4), 1 + tokens((8, 32, D))
  kernel = router.scorer.kernel
  kernel[...] = kernel[...].at[:, 4:].add(-0.2)  # a start far from balance
  graph, state = nnx.split(router)

  def loss(state):
    router = nnx.merge(graph, state)
    scores, plan = router.route(x, Context())
    stats = routing_stats(scores, plan, Context())
    return losses.balance(stats), stats.kept_e[:4].sum() / stats.tokens

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  means = []
  for _ in range(300):
    (_, mean), gradient = step(state)
    means.append(float(mean))
    state = jax.tree.map(lambda w, g: w - 2.0 * g, state, gradient)
  assert means[0] > 2.3
  assert means[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'k': 1}, 'k=1 with num_experts=4 and nulls=4: accepted are 2 to 8'),
    ({'nulls': 0}, 'nulls=0: accepted are integers from 1'),
  ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    make('ada_moe', **options)


def test_a_true_expert_of_no_probability_beside_a_null_one_has_weight_zero():
  """A softmax of which one part is exactly 0 in float32: its share of the true experts is 0, not 0 / 0."""
  logits = jnp.array([[-200.0, 0.0]])
  plan, _ = ada(logits, k=2, nulls=1)
  np.testing.assert_array_equal(plan.expert, [1, 0])
  np.testing.assert_array_equal(plan.weight, [0, 0])
  gradient = jax.grad(lambda logits: ada(logits, k=2, nulls=1)[0].weight.sum())(logits)
  np.testing.assert_array_equal(gradient, [[0, 0]])
