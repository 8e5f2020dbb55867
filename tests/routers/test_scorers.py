"""Token choice with other scorers and affinities: cosine, noisy, modified softmax, group-limited, V-MoE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, make_router
from moejax.moe import losses
from moejax.moe.stats import routing_stats
from moejax.routers import router_options
from moejax.routers.group_limited import GroupLimitedAffinity
from moejax.routers.top_k import TopKAssign
from moejax.routers.weighting import normalised
from tests.precisions import precisions

D, E = 8, 4
X = jax.random.normal(jax.random.key(1), (2, 6, D))


def make(name, num_experts=E, **options):
  return make_router(name, d_model=D, num_experts=num_experts, rngs=nnx.Rngs(0), **options)


def test_cosine_logits_are_bounded_and_blind_to_lengths():
  scorer = make('cosine', num_experts=8).scorer
  assert scorer.centroids.shape == (8, 4)
  logits, _ = scorer(X, Context())
  assert float(jnp.abs(logits).max()) <= 1 / 0.07 + 1e-4
  np.testing.assert_allclose(scorer(7 * X, Context())[0], logits, atol=1e-4)
  z, c = np.asarray(X @ scorer.kernel[...]), np.asarray(scorer.centroids[...])
  want = z @ c.T / np.linalg.norm(z, axis=-1)[..., None] / np.linalg.norm(c, axis=1) / 0.07
  np.testing.assert_allclose(logits, want, atol=1e-4)
  null = np.linalg.svd(np.asarray(scorer.kernel[...]).T)[2][-1]  # a direction that W does not see
  shifted = X + 3 * jnp.asarray(null, jnp.float32)[None, None]
  np.testing.assert_allclose(scorer(shifted, Context())[0], logits, atol=1e-3)
  assert not jnp.isnan(jax.grad(lambda x: scorer(x, Context())[0].sum())(jnp.zeros_like(X))).any()


def test_noisy_top_k_begins_with_random_even_choices():
  router = make('noisy_top_k', k=2)
  x = jnp.ones((8, 64, D))
  context = Context(train=True, rng=jax.random.key(0))
  scores = router.scores(x, context)
  assert float(jnp.abs(scores.logits).max()) == 0
  noise = np.asarray(scores.select)
  assert noise.std() == pytest.approx(np.log(2) + 0.01, rel=0.05)  # softplus(0) + 0.01
  plan = router(x, context)
  assert np.bincount(plan.expert, minlength=E) == pytest.approx([256] * E, rel=0.15)
  np.testing.assert_allclose(plan.weight.reshape(-1, 2).sum(1), 1, rtol=1e-5)
  np.testing.assert_array_equal(router(x).expert.reshape(-1, 2), np.tile([0, 1], (512, 1)))
  with pytest.raises(ValueError, match=r'noisy_top_k needs context\.rng in training'):
    router(x, Context(train=True))


def test_modified_softmax_is_bounded_and_contains_the_plain_one():
  bounded, plain = make('modified_softmax'), make('modified_softmax', function='identity')
  limit = np.abs(np.asarray(bounded.scorer.kernel[...])).sum(0).max()
  assert float(jnp.abs(bounded.scorer(1e6 * X, Context())[0]).max()) <= limit
  top_k = make('top_k')
  nnx.update(top_k.scorer.kernel, plain.scorer.kernel[...])
  jax.tree.map(np.testing.assert_array_equal, plain(X), top_k(X))


S8 = jnp.array([0.9, 0.1, 0.5, 0.45, 0.8, 0.05, 0.3, 0.6])


def group_choice(gate, bias=None, **options):
  logits = jnp.log(gate / (1 - gate))[None, None]
  sizes = {'function': 'sigmoid', 'k': 3, 'groups': 4, 'limit': 2, 'best': 2} | options
  scores = GroupLimitedAffinity(**sizes)(logits, None, bias, Context())
  return TopKAssign(3, normalised, 2.5)(scores, Context())


def test_group_limited_choice_of_eight_experts_in_four_groups():
  """Group scores 1.0, 0.95, 0.85, 0.9: groups 0 and 1 stay; unrestricted it would be 0, 4, 7."""
  plan = group_choice(S8)
  assert plan.expert.tolist() == [0, 2, 3]
  np.testing.assert_allclose(plan.weight, [1.216216, 0.675676, 0.608108], atol=2e-6)
  assert group_choice(S8, limit=4).expert.tolist() == [0, 4, 7]
  assert group_choice(S8, best=1).expert.tolist() == [
    0,
    4,
    1,
  ]  # V2: by the best of a group, groups 0 and 2
  assert group_choice(S8, jnp.zeros(8)).expert.tolist() == [0, 2, 3]


def test_a_bias_moves_groups_and_makes_no_score_of_another_group_better():
  """All selection scores negative: what a fill with zeros would get wrong. Weights stay those without bias."""
  plan = group_choice(S8, jnp.array([-2.0] * 6 + [-1.0] * 2))
  assert plan.expert.tolist() == [7, 6, 0]  # groups 3 (-1.1) and 0 (-3.0)
  np.testing.assert_allclose(plan.weight, 2.5 * np.array([0.6, 0.3, 0.9]) / 1.8, rtol=1e-5)


def test_deepseek_moe_on_devices_is_group_limited_without_a_limit():
  """The plain router of 'softmax_topk', and its device-level loss `sum_g mean(f_e in g) sum(P_e in g)`."""
  options = {'groups': 4, 'limit': 4, 'weighting': 'softmax_topk', 'route_scale': 1.0}
  router = make('group_limited', num_experts=8, balance_bias=False, **options)
  plain = make('top_k', num_experts=8, weighting='softmax_topk')
  nnx.update(plain.scorer.kernel, router.scorer.kernel[...])
  jax.tree.map(np.testing.assert_array_equal, plain(X), router(X))
  scores, plan = router.route(X, Context())
  stats = routing_stats(scores, plan, Context())
  tokens = plan.token.size // 2
  f_e = 8 / (2 * tokens) * np.bincount(plan.expert, minlength=8)  # (N' / (K' T)) sum of choices
  p_e = np.asarray(scores.probs).mean((0, 1))
  want = (f_e.reshape(4, 2).mean(1) * p_e.reshape(4, 2).sum(1)).sum()
  assert float(losses.cluster_balance(stats)) == pytest.approx(want, rel=1e-5)


def test_group_limited_balances_groups():
  router = make('group_limited', num_experts=8)
  assert router.bias is not None
  assert router.scores(X, Context()).clusters == 4
  plan = router(X)
  groups = np.asarray(plan.expert).reshape(-1, 2) // 2
  assert max(len(set(row.tolist())) for row in groups) == 2
  np.testing.assert_allclose(plan.weight.reshape(-1, 2).sum(1), 2.5, rtol=1e-5)


def test_vmoe_is_noisy_capped_top_2_with_softmax_weights():
  router = make('vmoe')
  assert (router.assign.k, router.assign.capacity.train_factor) == (2, 1.05)
  assert router.scorer.noise_std == 1
  assert not router.flags.prefix_safe
  free = make('vmoe', capacity_factor=4.0)
  gate = jax.nn.softmax(X @ free.scorer.kernel[...])
  want = jnp.sort(gate, -1)[..., ::-1][..., :2]
  np.testing.assert_allclose(free(X).weight.reshape(2, 6, 2), want, rtol=1e-5)


def test_options_of_shared_functions_reach_their_routers():
  for name in ('top_k', 'cosine', 'noisy_top_k', 'vmoe', 'group_limited', 'modified_softmax'):
    assert {'k', 'weighting', 'capacity_factor', 'renorm_after_drop'} <= set(router_options(name))
  assert 'k' not in router_options('switch')
  assert 'noise_std' in router_options('gshard')
  assert not {'scorer', 'affinity'} & set(router_options('cosine'))


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('group_limited', {'groups': 3}, 'groups=3 does not divide num_experts=4'),
    ('group_limited', {'limit': 5}, 'limit=5 with groups=4: accepted are 1 to 4'),
    ('group_limited', {'k': 3}, 'k=3 with limit=2 of groups=4 of 1: accepted are 1 to 2'),
    ('group_limited', {'best': 0}, 'best=0: accepted are integers from 1'),
    ('cosine', {'temperature': 0.0}, 'temperature=0.0: accepted are positive numbers'),
    ('cosine', {'width': 0}, 'width=0: accepted are integers from 1'),
    ('modified_softmax', {'function': 'exp'}, "function='exp': accepted are 'cos', 'identity'"),
  ],
)
def test_bad_options_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, **options)


@pytest.mark.parametrize('name', ['top_k', 'cosine', 'rmoe', 'kamoe', 'sinkhorn'])
def test_accelerators_are_not_to_cut_the_inputs_of_a_routers_products(name):
  """Their usual products of float32 look at 8 or 11 bits of 24; here neither way, forward or backward, does."""
  router = make_router(name, d_model=8, num_experts=4, rngs=nnx.Rngs(0))
  graph, params, rest = nnx.split(router, nnx.Param, ...)

  def loss(params, x):
    plan = nnx.merge(graph, params, rest)(x, Context(train=True))
    return (plan.weight**2).sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, jnp.ones((1, 6, 8)))
  found = precisions(jaxpr.jaxpr)
  assert len(found) >= 3
  assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize('option', ['noise_std', 'jitter', 'init_std'])
def test_a_spread_below_zero_is_refused(option):
  with pytest.raises(ValueError, match=f'{option}=-1.0: accepted are numbers from 0'):
    make_router('top_k', d_model=8, num_experts=4, **{option: -1.0}, rngs=nnx.Rngs(0))
