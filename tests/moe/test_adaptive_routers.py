"""Routers with any number of experts a token: golden values of one logits table, and what each method promises."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context, MoE, make_router, oracle
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe import losses
from moejax.moe.exchange import AllGather, single
from moejax.moe.stats import routing_stats
from moejax.routers import weighting
from moejax.routers.ada_moe import NullAffinity, NullAssign
from moejax.routers.affinity import TokenAffinity
from moejax.routers.dense_to_sparse import DenseToSparse
from moejax.routers.smile import BilevelScorer
from moejax.routers.top_k import TopKAssign
from moejax.routers.top_p import TopPAssign

D = 8

# The table of tests/moe/test_golden.py: six tokens, four experts.
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


def tokens(shape=(2, 6, D), seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


def make(name, num_experts=4, **options):
  return make_router(name, d_model=D, num_experts=num_experts, rngs=nnx.Rngs(0), **options)


def kept(plan):
  """Experts kept by each token."""
  return (np.asarray(plan.expert) < plan.num_experts).reshape(plan.groups, -1).sum(1)


# ---- top-p ---------------------------------------------------------------------------------------


def top_p(p, logits=H, max_k=4, renorm=False):
  scores = TokenAffinity('softmax', 4)(logits[None], None, None, Context())
  return TopPAssign(p, p, max_k, renorm)(scores, Context())


@pytest.mark.parametrize(
  ('p', 'want'),
  [
    (0.0, [1, 1, 1, 1, 1, 1]),
    (0.4, [1, 1, 1, 1, 1, 2]),
    (0.6, [1, 2, 1, 2, 1, 3]),
    (0.9, [3, 4, 3, 3, 3, 4]),
    (1.0, [4, 4, 4, 4, 4, 4]),
  ],
)
def test_top_p_keeps_as_many_as_it_takes_to_exceed_p(p, want):
  np.testing.assert_array_equal(kept(top_p(p)), want)


def test_top_p_weights_are_the_probabilities_of_the_kept():
  probs = np.asarray(jax.nn.softmax(H, -1), np.float64)
  for p in (0.0, 0.3, 0.6, 0.9):
    plan, renormed = top_p(p), top_p(p, renorm=True)
    for t in range(6):
      order = np.argsort(-probs[t], kind='stable')
      total, want = 0.0, {}
      for e in order:  # the definition: add experts until the sum exceeds p
        want[e] = probs[t, e]
        total += probs[t, e]
        if total > p:
          break
      row = slice(4 * t, 4 * t + len(want))
      assert plan.expert[row].tolist() == list(want)
      np.testing.assert_allclose(plan.weight[row], list(want.values()), rtol=1e-5)
      np.testing.assert_allclose(renormed.weight[row] * total, list(want.values()), rtol=1e-5)


def test_top_p_of_equal_logits_costs_what_the_entropy_loss_is_there_for():
  """16 experts, p = 0.4: seven experts a token."""
  scores = TokenAffinity('softmax', 16)(jnp.zeros((1, 3, 16)), None, None, Context())
  assert kept(TopPAssign(0.4, 0.4, 16)(scores, Context())).tolist() == [7, 7, 7]
  assert kept(TopPAssign(0.4, 0.4, 5)(scores, Context())).tolist() == [5, 5, 5]


def test_top_p_has_one_p_for_training_and_one_for_evaluation():
  router = make('top_p', p=0.9, eval_p=0.0)
  assert kept(router(tokens(), Context(train=True))).min() >= 2
  assert kept(router(tokens(), Context())).max() == 1


# ---- AdaMoE --------------------------------------------------------------------------------------


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


# ---- dense to sparse -----------------------------------------------------------------------------


def dts(**options):
  defaults = dict(
    tau_max=2.0,
    tau_min=0.2,
    decay='linear',
    switch_at=1.0,
    threshold=0.001,
    tempered=True,
    gumbel=False,
  )
  return DenseToSparse(**(defaults | options))


def at(progress):
  return Context(train=True, progress=jnp.float32(progress), rng=jax.random.key(0))


def test_tempered_weights_and_the_threshold():
  """Logits (2, 1, 0, -1): at tau 0.2 two experts are above 0.001, at tau 2 all four."""
  logits, gate = H[None, :1], dts()
  early = gate(logits, None, None, at(0.0))
  np.testing.assert_allclose(early.gate[0, 0], [0.455054, 0.276004, 0.167405, 0.101536], atol=1e-6)
  assert kept(gate.assign(early, at(0.0))).tolist() == [4]
  gate = dts(tau_max=0.2)
  late = gate(logits, None, None, at(0.5))
  np.testing.assert_allclose(late.gate[0, 0], [0.993262, 0.006693, 0.000045, 0.0], atol=2e-6)
  assert kept(gate.assign(late, at(0.5))).tolist() == [2]


@pytest.mark.parametrize('decay', ['linear', 'exponential'])
def test_the_temperature_falls_and_the_experts_with_it(decay):
  gate = dts(decay=decay, threshold=0.05, switch_at=0.8)
  assert float(gate.temperature(jnp.float32(0.4))) == pytest.approx(
    {'linear': 1.1, 'exponential': (2.0 * 0.2) ** 0.5}[decay], rel=1e-5
  )
  counts = []
  for progress in np.linspace(0, 1, 11):
    context = at(progress)
    counts.append(kept(gate.assign(gate(H[None], None, None, context), context)).mean())
  assert counts[0] > 3
  assert all(a >= b for a, b in itertools.pairwise(counts))
  assert counts[7] > 1
  assert counts[8:] == [1, 1, 1]


@pytest.mark.parametrize('context', [at(1.0), Context()], ids=['switched', 'evaluation'])
def test_after_the_switch_it_is_switch(context):
  """Also with noise on: the last phase has none."""
  router = make('dense_to_sparse', tau_min=0.2, switch_at=0.9)
  plain = make('top_k', k=1)
  plan, want = router(tokens(), context), plain(tokens(), context)
  first = plan.weight.reshape(12, -1)
  np.testing.assert_array_equal(plan.expert.reshape(12, -1)[:, 0], want.expert)
  np.testing.assert_allclose(first[:, 0], want.weight, rtol=1e-6)
  assert float(first[:, 1:].sum()) == 0


def test_hot_gates_are_uniform():
  gate = dts(tau_max=1e4, tau_min=1e4)
  np.testing.assert_allclose(gate(H[None], None, None, at(0.0)).gate, 0.25, atol=1e-3)


# ---- DS-MoE --------------------------------------------------------------------------------------


def test_all_experts_in_evaluation_are_the_training_forward():
  layer = MoE(D, 6, 4, {'name': 'ds_moe'}, rngs=nnx.Rngs(0))
  x = tokens()
  np.testing.assert_allclose(layer(x)[0], layer(x, Context(train=True))[0], atol=1e-6)
  probs = jax.nn.softmax(x @ layer.router.scorer.kernel[...], -1)
  want = sum(probs[..., e : e + 1] * layer.experts.expert(e)(x) for e in range(4))
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_evaluation_keeps_the_most_probable_at_their_probability():
  x = tokens()
  probs = np.asarray(make('ds_moe').scores(x, Context()).probs).reshape(12, 4)
  two = make('ds_moe', eval_k=2)(x, Context())
  np.testing.assert_allclose(two.weight.reshape(12, 2), -np.sort(-probs, 1)[:, :2], rtol=1e-6)
  above = make('ds_moe', eval_threshold=0.3)(x, Context())
  np.testing.assert_array_equal(kept(above), (probs > 0.3).sum(1))
  assert kept(make('ds_moe', eval_k=2)(x, Context(train=True))).tolist() == [4] * 12


# ---- structured routers --------------------------------------------------------------------------


def test_bilevel_probabilities_are_products_and_the_joint_choice_is_the_two_choices():
  scorer, x = BilevelScorer(D, 3, 2, rngs=nnx.Rngs(0)), tokens()
  logits, _ = scorer(x, Context())
  both = x @ scorer.kernel[...]
  node, member = jax.nn.softmax(both[..., :3], -1), jax.nn.softmax(both[..., 3:], -1)
  want = (node[..., :, None] * member[..., None, :]).reshape(2, 6, 6)
  probs = jax.nn.softmax(logits, -1)
  np.testing.assert_allclose(probs, want, rtol=1e-5)
  plan = make('smile', 6, nodes=3)(x)
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


# ---- zero-computation experts --------------------------------------------------------------------

ZERO = {'copy': 1, 'constant': 2, 'zero': 1}


def zero_layer(router=None, **options):
  router = router or {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk'}
  return MoE(D, 6, 4, router, zero_experts=ZERO, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
  'router',
  [None, {'name': 'ada_moe', 'k': 3, 'nulls': 2}, {'name': 'top_p'}, {'name': 'expert_choice'}],
  ids=['top_k', 'ada_moe', 'top_p', 'expert_choice'],
)
def test_zero_computation_experts_are_the_oracles(router):
  """Value and gradient; the rows of expert choice are not token-major."""
  layer, x = zero_layer(router), tokens()
  mask = jnp.arange(6)[None] < jnp.array([6, 4])[:, None]
  graph, state = nnx.split(layer)

  def by_layer(state, x):
    return nnx.merge(graph, state)(x, Context(mask=mask))[0]

  def by_oracle(state, x):
    layer = nnx.merge(graph, state)
    plan = layer.router(x, Context(mask=mask))
    return oracle.moe(x, plan, layer.experts, layer.zero)

  target = jax.random.normal(jax.random.key(3), x.shape)
  got, want = (
    jax.jit(jax.value_and_grad(lambda s, x, f=f: (f(s, x) * target).sum(), (0, 1)))(state, x)
    for f in (by_layer, by_oracle)
  )
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert float(jnp.abs(got[1][0].zero.value[...]).max()) > 1e-3
  assert float(jnp.abs(got[1][0].zero.mix[...]).max()) > 1e-3


@pytest.mark.parametrize('name', ['top_k', 'ada_moe'])
def test_on_a_mesh_only_rows_of_the_bank_travel(name):
  """Four experts over four devices, two shards of data: value and gradient of one device."""
  router = {'name': name, 'k': 3}
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  x = tokens((8, 6, D))
  results = []
  for exchange in (single, AllGather(mesh, BATCH_AXES)):
    graph, state = nnx.split(zero_layer(router, exchange=exchange))
    loss = lambda state, x, graph=graph: (nnx.merge(graph, state)(x)[0] ** 2).sum()
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    placed = x if exchange is single else jax.device_put(x, sharding)
    results.append(jax.jit(jax.value_and_grad(loss, (0, 1)))(state, placed))
  for a, b in zip(*map(jax.tree.leaves, results), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=2e-5)


def force(layer, expert):
  """All tokens take `expert` first."""
  kernel = layer.router.scorer.kernel
  kernel[...] = jnp.zeros_like(kernel[...]).at[:, expert].set(5.0)
  return layer


def test_a_copy_gives_the_token_and_a_constant_lies_between_token_and_value():
  x = jnp.abs(tokens())
  router = {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk'}
  layer = force(zero_layer(router), 4)
  weight = layer.router(x).weight.reshape(2, 6, 1)
  np.testing.assert_allclose(layer(x)[0], weight * x, rtol=1e-5)
  layer = force(zero_layer(router), 6)  # the second constant
  y = layer(x)[0] / layer.router(x).weight.reshape(2, 6, 1)
  value = layer.zero.value[...][1][None, None]
  along = ((y - x) * (value - x)).sum(-1) / ((value - x) ** 2).sum(-1)
  assert float(along.min()) > 0
  assert float(along.max()) < 1
  np.testing.assert_allclose(y, x + along[..., None] * (value - x), atol=1e-4)
  assert float(jnp.abs(force(zero_layer(router), 7)(x)[0]).max()) == 0


def test_without_zero_computation_choices_it_is_the_plain_layer():
  layer = zero_layer()
  router = {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk'}
  plain = MoE(D, 6, 4, router, rngs=nnx.Rngs(0))
  nnx.update(plain.experts, nnx.split(layer.experts)[1])
  kernel = layer.router.scorer.kernel[...]
  plain.router.scorer.kernel[...] = kernel[:, :4]
  layer.router.scorer.kernel[...] = kernel.at[:, 4:].set(-60.0)
  x = jnp.abs(tokens())
  np.testing.assert_allclose(layer(x)[0], plain(x)[0], atol=1e-6)


def test_the_balance_loss_with_costs():
  """Experts 0 and 1 feed-forward, 2 and 3 without computation, tau = 0.75: the paper's sum, with f divided by k."""
  scores = TokenAffinity('softmax', 2)(H[None], None, None, Context())
  plan = TopKAssign(2, weighting.raw)(scores, Context())
  stats = routing_stats(scores, plan, Context(), (1.0, 1.0, 0.75, 0.75))
  assert float(losses.cost_balance(stats)) / 4 == pytest.approx(0.311915, abs=1e-6)
  sizes = routing_stats(
    scores, plan, Context(), (0.4, 0.8, 1.2, 1.6)
  )  # HMoE: 1, 2, 3, 4 over their mean
  assert 2 * float(losses.cost_balance(sizes)) == pytest.approx(1.578059, abs=1e-6)
  equal = routing_stats(scores, plan, Context())
  assert float(losses.cost_balance(equal)) == pytest.approx(1.279980, abs=1e-6)


def test_the_layer_knows_the_costs_and_counts_all_experts():
  _, aux = zero_layer(zero_cost=0.75, losses={'cost_balance': 1.0})(tokens())
  np.testing.assert_allclose(aux.stats.cost_e / 12, [1] * 4 + [0.75] * 4)
  assert aux.metrics['load'].shape == (8,)
  assert float(aux.metrics['load'].sum()) == pytest.approx(1)
  assert float(aux.losses['cost_balance']) < float(
    zero_layer(losses={'balance': 1.0})(tokens())[1].losses['balance']
  )


def test_cheap_experts_take_the_share_of_the_capacity_formula():
  """Two feed-forward and two zero-computation experts, k = 1; c f P has its saddle where the costs c P are equal:
  tau N_F / (tau N_F + N_Z) of the probability goes to feed-forward experts. tau = 0.5: a third."""
  x = tokens((4, 64, D))
  layer = MoE(
    D, 6, 2, {'name': 'top_k', 'k': 1}, zero_experts={'copy': 1, 'zero': 1}, zero_cost=0.5,
    losses={'cost_balance': 1.0}, rngs=nnx.Rngs(0),
  )  # fmt: skip
  graph, state = nnx.split(layer, nnx.Param)

  def loss(state):
    aux = nnx.merge(graph, state)(x)[1]
    return aux.losses['cost_balance'], aux.stats.kept_e[:2].sum() / aux.stats.tokens

  step = jax.jit(jax.value_and_grad(loss, has_aux=True))
  shares = []
  for _ in range(200):
    (_, share), gradient = step(state)
    shares.append(float(share))
    state = jax.tree.map(lambda w, g: w - 0.5 * g, state, gradient)
  assert np.mean(shares[-50:]) == pytest.approx(1 / 3, abs=0.05)


# ---- losses --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('top_p', {'p': -0.1}, 'p=-0.1: accepted are numbers from 0'),
    ('top_p', {'max_k': 5}, 'max_k=5 with num_experts=4: accepted are 1 to 4'),
    ('top_p', {'max_k': 1, 'renorm': True}, "the router's gradient zero"),
    ('ada_moe', {'k': 1}, 'k=1 with num_experts=4 and nulls=4: accepted are 2 to 8'),
    ('ada_moe', {'nulls': 0}, 'nulls=0: accepted are integers from 1'),
    ('dense_to_sparse', {'tau_min': 3.0}, 'tau_min=3.0, tau_max=2.0: accepted are'),
    ('dense_to_sparse', {'decay': 'cosine'}, "decay='cosine': accepted are 'linear'"),
    ('dense_to_sparse', {'switch_at': 2.0}, 'switch_at=2.0: accepted are numbers from 0 to 1'),
    ('ds_moe', {'eval_k': 0}, 'eval_k=0 with num_experts=4: accepted are 1 to 4'),
    ('ds_moe', {'eval_threshold': 1.0}, 'eval_threshold=1.0: accepted are numbers'),
    ('moec', {'clusters': 3}, 'clusters=3 does not divide num_experts=4'),
    ('moec', {'dropout': 1.0}, 'dropout=1.0: accepted are numbers'),
    ('smile', {'nodes': 3}, 'nodes=3 does not divide num_experts=4'),
  ],
)
def test_bad_options_are_refused_in_one_sentence(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, **options)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'zero_experts': {'nil': 1}}, "zero_experts kind 'nil': accepted are 'copy'"),
    ({'zero_experts': {'copy': -1}}, r"zero_experts\['copy'\]=-1: accepted are integers from 0"),
    ({'shared_mix': True}, 'shared_mix=True with num_shared=0: accepted are integers from 1'),
  ],
)
def test_bad_layer_options_are_refused_in_one_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    MoE(D, 6, 4, **options, rngs=nnx.Rngs(0))


def test_zero_experts_need_rows_and_noise_needs_a_key():
  with pytest.raises(ValueError, match='zero_experts with a soft router'):
    MoE(D, 6, 4, 'soft', zero_experts={'copy': 1}, rngs=nnx.Rngs(0))(tokens())
  context = Context(train=True, progress=jnp.float32(0.5))
  with pytest.raises(ValueError, match='gumbel=True needs context.rng in training'):
    make('dense_to_sparse')(tokens(), context)


# ---- residual mixture ----------------------------------------------------------------------------


def test_a_learnt_mix_of_routed_and_shared_is_convex():
  layer = MoE(D, 6, 4, {'name': 'top_k', 'k': 1}, num_shared=1, shared_mix=True, rngs=nnx.Rngs(0))
  plain = MoE(D, 6, 4, {'name': 'top_k', 'k': 1}, rngs=nnx.Rngs(0))
  nnx.update(plain.experts, nnx.split(layer.experts)[1])
  nnx.update(plain.router, nnx.split(layer.router)[1])
  x = tokens()
  bias = layer.shared_mix.bias
  bias[...] = jnp.array([0.3, -0.2])
  logits = np.asarray(x @ layer.shared_mix.weight[...] + jnp.array([0.3, -0.2])[None, None])
  share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  want = share[..., :1] * plain(x)[0] + share[..., 1:] * layer.shared.expert(0)(x)
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_one_expert_and_one_shared_are_two_dense_layers():
  layer = MoE(D, 6, 1, {'name': 'top_k', 'k': 1}, num_shared=1, rngs=nnx.Rngs(0))
  x = tokens()
  want = layer.experts.expert(0)(x) + layer.shared.expert(0)(x)
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)
