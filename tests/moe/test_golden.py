"""Golden values: one logits table, computed by hand in float64, for six tokens and four experts.

Rows 3 and 5 differ in their winners, token 5 has nearly equal logits; every weighting, loss and capacity order
gives another answer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.arrays import Context, Scores
from moejax.moe import losses
from moejax.moe.controllers import balance_bias
from moejax.moe.stats import routing_stats
from moejax.routers import weighting
from moejax.routers.affinity import TokenAffinity, load_probability
from moejax.routers.capacity import capacity, keep_within_capacity
from moejax.routers.expert_choice import ExpertAffinity, ExpertChoiceAssign, capped_plan
from moejax.routers.sinkhorn import sinkhorn_plan
from moejax.routers.soft import Mix, normalise, slot_affinity
from moejax.routers.top_k import TopKAssign

H = jnp.array(
  [
    [2.0, 1.0, 0.0, -1.0],
    [1.5, 1.4, 0.2, 0.1],
    [0.3, 2.2, 0.1, -0.5],
    [1.8, -0.2, 0.9, 0.4],
    [2.5, 0.6, -0.3, 0.0],
    [0.0, 0.1, 0.2, 0.3],
  ],
  jnp.float32,
)
TOP_2 = [[0, 1], [0, 1], [1, 0], [0, 2], [0, 1], [3, 2]]


def route(k, function='softmax', weights=weighting.raw, **options):
  scores = TokenAffinity(function, k)(H[None], None, None, Context())
  return scores, TopKAssign(k, weights, **options)(scores, Context())


def test_softmax_and_choices():
  scores, plan = route(2)
  np.testing.assert_allclose(
    scores.probs[0, 0], [0.643914, 0.236883, 0.087144, 0.032059], atol=1e-6
  )
  np.testing.assert_allclose(
    scores.probs[0, 5], [0.213838, 0.236328, 0.261183, 0.288651], atol=1e-6
  )
  np.testing.assert_array_equal(plan.expert.reshape(6, 2), TOP_2)


def test_softmax_weights_normalised_over_the_chosen():
  want = [
    [0.731059, 0.268941], [0.524979, 0.475021], [0.869892, 0.130108],
    [0.710950, 0.289050], [0.869892, 0.130108], [0.524979, 0.475021],
  ]  # fmt: skip
  np.testing.assert_allclose(
    route(2, weights=weighting.normalised)[1].weight.reshape(6, 2), want, atol=1e-6
  )


def test_sigmoid_weights_normalised_over_the_chosen():
  want = [
    [0.546449, 0.453551], [0.504751, 0.495249], [0.610466, 0.389534],
    [0.546906, 0.453094], [0.588701, 0.411299], [0.510944, 0.489056],
  ]  # fmt: skip
  _, plan = route(2, 'sigmoid', weighting.normalised)
  np.testing.assert_allclose(plan.weight.reshape(6, 2), want, atol=1e-6)
  _, plan = route(2, 'sigmoid', weighting.normalised, scale=2.5)
  np.testing.assert_allclose(plan.weight.reshape(6, 2), 2.5 * np.array(want), atol=3e-6)


@pytest.mark.parametrize(
  ('k', 'fractions', 'value'),
  [(2, [5 / 12, 4 / 12, 2 / 12, 1 / 12], 1.279980), (1, [4 / 6, 1 / 6, 0, 1 / 6], 1.479767)],
)
def test_balance_loss_in_the_form_that_is_one_when_balanced(k, fractions, value):
  stats = routing_stats(*route(k), Context())
  np.testing.assert_allclose(stats.prob_e / 6, [0.452471, 0.297432, 0.137762, 0.112336], atol=1e-6)
  np.testing.assert_allclose(stats.chosen_e / (6 * k), fractions, atol=1e-6)
  assert float(losses.balance(stats)) == pytest.approx(value, abs=1e-6)
  assert float(losses.sequence_balance(stats)) == pytest.approx(value, abs=1e-6)


def test_other_losses():
  stats = routing_stats(*route(2), Context())
  assert float(losses.z(stats)) == pytest.approx(5.584028, abs=1e-5)
  assert float(losses.entropy(stats)) == pytest.approx(1.044669, abs=1e-6)
  assert float(losses.mutual_information(stats)) == pytest.approx(-0.193483, abs=1e-6)
  assert float(losses.importance(stats)) == pytest.approx(0.299172, abs=1e-6)  # population variance


def test_losses_at_balance_and_at_collapse():
  """Four experts, k = 1. One-hot probabilities: balanced over all experts, and collapsed onto the first."""

  def stats_of(winners):
    logits = 50.0 * jax.nn.one_hot(jnp.array(winners), 4)
    scores = TokenAffinity('softmax', 1)(logits[None], None, None, Context())
    return routing_stats(scores, TopKAssign(1, weighting.raw)(scores, Context()), Context())

  balanced, collapsed = stats_of([0, 1, 2, 3]), stats_of([0, 0, 0, 0])
  assert float(losses.balance(balanced)) == pytest.approx(1)
  assert float(losses.balance(collapsed)) == pytest.approx(4)
  assert float(losses.mutual_information(balanced)) == pytest.approx(-np.log(4), rel=1e-5)
  assert float(losses.mutual_information(collapsed)) == pytest.approx(0, abs=1e-6)
  assert float(losses.importance(balanced)) == pytest.approx(0, abs=1e-6)
  assert float(losses.load(collapsed)) == pytest.approx(3, rel=1e-5)


def test_adding_a_constant_to_the_logits_moves_the_z_loss_alone():
  def values(shift):
    scores = TokenAffinity('softmax', 2)(H[None] + shift, None, None, Context())
    stats = routing_stats(scores, TopKAssign(2, weighting.raw)(scores, Context()), Context())
    return [float(f(stats)) for f in (losses.balance, losses.mutual_information, losses.z)]

  here, there = values(0.0), values(1.0)
  assert here[:2] == pytest.approx(there[:2], abs=1e-5)
  assert abs(here[2] - there[2]) > 1


def test_the_gradient_of_the_balance_loss_sums_to_zero_over_experts():
  def loss(logits):
    scores = TokenAffinity('softmax', 2)(logits[None], None, None, Context())
    return losses.balance(
      routing_stats(scores, TopKAssign(2, weighting.raw)(scores, Context()), Context())
    )

  gradient = jax.grad(loss)(H)
  np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-7)
  assert float(jnp.abs(gradient).max()) > 1e-3


KEPT = {
  'choice_major': ['11', '11', '10', '11', '00', '11'],
  'token_major': ['11', '11', '11', '01', '00', '11'],
  'score': ['11', '00', '10', '11', '11', '11'],
}


@pytest.mark.parametrize('priority', KEPT)
def test_capacity_of_three_with_two_choices(priority):
  order = jax.nn.softmax(H).max(-1) if priority == 'score' else None
  kept = keep_within_capacity(jnp.array(TOP_2), 4, 3, priority, order)
  assert [''.join(str(int(bit)) for bit in row) for row in kept] == KEPT[priority]


def test_capacity_of_two_with_one_choice():
  first = jnp.array(TOP_2)[:, :1]
  kept = keep_within_capacity(first, 4, 2, 'token_major')
  assert np.flatnonzero(kept).tolist() == [0, 1, 2, 5]
  kept = keep_within_capacity(first, 4, 2, 'score', jax.nn.softmax(H).max(-1))
  assert np.flatnonzero(kept).tolist() == [0, 2, 4, 5]


def test_capacity_is_rounded_up_and_bounded():
  assert capacity(6, 4, 2, 1.0) == 3
  assert capacity(6, 4, 2, 1.01) == 4
  assert capacity(6, 4, 2, 100.0) == 6
  assert capacity(6, 4, 1, 0.01) == 1
  assert capacity(10, 10, 1, 1.1) == 2


def test_expert_choice_takes_the_best_tokens_of_each_expert():
  scores = ExpertAffinity('experts', 'sequence')(H[None], None, None, Context())
  plan = ExpertChoiceAssign(4 * 2 / 6, 'sequence')(scores, Context())  # C = 2
  np.testing.assert_array_equal(plan.token.reshape(4, 2), [[4, 0], [2, 1], [5, 3], [5, 3]])
  want = [[0.773716, 0.643914], [0.746697, 0.373288], [0.261183, 0.227324], [0.288651, 0.137879]]
  np.testing.assert_allclose(plan.weight.reshape(4, 2), want, atol=1e-6)


def test_capped_expert_choice_gives_no_token_more_than_its_cap():
  """64 tokens, some of which all experts like; 16 rows an expert. A cap with room drops next to nothing."""
  logits = jax.random.normal(jax.random.key(0), (1, 64, 8)) + jnp.linspace(0, 3, 64)[None, :, None]
  scores = ExpertAffinity('tokens', 'sequence')(logits, None, None, Context())

  def multiplicity(cap):
    plan = ExpertChoiceAssign(2.0, 'sequence', cap)(scores, Context())
    np.testing.assert_array_equal(jnp.bincount(plan.chosen, length=8), 16)
    return np.bincount(plan.token[plan.expert < 8], minlength=64)

  free, three, two = multiplicity(None), multiplicity(3), multiplicity(2)
  assert free.max() >= 5
  assert free.sum() == 128
  assert three.max() == 3
  assert three.sum() >= 126
  assert two.max() == 2
  assert two.sum() >= 122  # every token would need exactly two: the hardest cap


def test_the_capped_plan_meets_its_constraints():
  score = jax.nn.softmax(jax.random.normal(jax.random.key(1), (1, 8, 32)), 1)
  assert float(capped_plan(score, 8, 8).sum(1).max()) > 3.5  # the cap below binds
  plan = capped_plan(score, 8, 3)
  np.testing.assert_allclose(plan.sum(2), 8, rtol=1e-4)
  assert float(plan.sum(1).max()) < 3.02
  assert float(plan.max()) <= 1 + 1e-6


def test_sinkhorn_plan_of_six_rounds():
  plan = sinkhorn_plan(H[None], iterations=6)[0]
  np.testing.assert_allclose(plan[0], [0.4124, 0.2541, 0.2269, 0.1066], atol=6e-5)
  np.testing.assert_allclose(plan[5], [0.0675, 0.1249, 0.3350, 0.4727], atol=6e-5)
  assert plan.argmax(-1).tolist() == [0, 1, 1, 2, 0, 3]
  assert H.argmax(-1).tolist() == [0, 0, 1, 0, 0, 3]
  np.testing.assert_allclose(plan.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(plan.sum(0), 6 / 4, rtol=1e-4)


def test_soft_mixing():
  x = jnp.array([[[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]])
  phi = jnp.array([[1.0, 0.0], [1.0, 1.0]])[:, :, None]  # slots (1, 1) and (0, 1), one an expert
  logits = jnp.einsum('BSD,DEP->BSEP', normalise(x, -1), normalise(phi, 0))
  plan = Mix()(slot_affinity(logits, None, None, Context()), Context())
  slots = jnp.einsum('BSEP,BSD->BEPD', plan.dispatch, x)[0, :, 0]
  np.testing.assert_allclose(slots, [[1.497098, 2.196518], [1.291530, 2.412375]], atol=2e-5)
  y = jnp.einsum('BSEP,EPD->BSD', plan.combine, slots[:, None])[0]
  want = [[1.429211, 2.267802], [1.379368, 2.320140], [1.404046, 2.294226]]
  np.testing.assert_allclose(y, want, atol=2e-5)


def test_load_probability_of_three_experts():
  clean, noisy = jnp.array([1.0, 0.5, 0.0]), jnp.array([1.2, 0.1, 0.3])
  got = load_probability(clean, noisy, jnp.ones(()), 1)
  np.testing.assert_allclose(got, [0.758036, 0.241964, 0.115070], atol=1e-6)
  of_all = load_probability(clean, noisy, jnp.ones(()), 1, one_threshold=True)  # 1.2 for all three
  np.testing.assert_allclose(of_all, [0.420740, 0.241964, 0.115070], atol=1e-6)
  assert float(load_probability(clean, noisy, jnp.ones(()), 3).min()) == 1
  nearly_none = load_probability(noisy, noisy, jnp.full((), 1e-4), 1)
  np.testing.assert_allclose(nearly_none, [1, 0, 0], atol=1e-6)


def test_bias_moves_the_choice_but_not_the_weights():
  gate = jnp.array([0.9, 0.1, 0.5, 0.45, 0.8, 0.05, 0.3, 0.6])
  bias = jnp.array([-0.5, 0, 0, 0, 0, 0, 0, 0.4])
  scores = Scores(*(a[None, None] for a in (gate, gate + bias, gate, gate)))
  plan = TopKAssign(3, weighting.normalised)(scores, Context())
  assert plan.expert.tolist() == [7, 4, 2]
  np.testing.assert_allclose(plan.weight, [0.315789, 0.421053, 0.263158], atol=1e-6)


def test_bias_steps_towards_balance():
  step = balance_bias(jnp.zeros(4), jnp.array([5.0, 1.0, 3.0, 3.0]), 0.1)
  np.testing.assert_allclose(step, [-0.1, 0.1, 0, 0], atol=1e-7)


def test_global_and_local_balance_differ():
  """Two ranks, two experts, k = 1: each rank is skewed one way, together they are balanced."""

  def stats_of(fraction, prob):
    zeros, two = jnp.zeros(()), jnp.array(fraction)
    return losses.RoutingStats(
      tokens=jnp.ones(()), chosen_e=two, kept_e=two, prob_e=jnp.array(prob), weight_e=two, load_e=two,
      z=zeros, entropy=zeros, sequence_balance=zeros, unrouted=zeros,
    )  # fmt: skip

  ranks = [stats_of([0.9, 0.1], [0.8, 0.2]), stats_of([0.1, 0.9], [0.2, 0.8])]
  assert [float(losses.balance(rank)) for rank in ranks] == pytest.approx([1.48, 1.48])
  assert float(losses.balance(jax.tree.map(jnp.add, *ranks))) == pytest.approx(1.0)
