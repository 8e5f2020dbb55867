"""Experts without computation (MoE++): against the oracle, on a mesh, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context, MoE, oracle
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe import losses
from moejax.moe.exchange import AllGather, single
from moejax.moe.stats import routing_stats
from moejax.routers import weighting
from moejax.routers.affinity import TokenAffinity
from moejax.routers.top_k import TopKAssign
from tests.routers.table import D, H, tokens

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


def test_a_zero_expert_leaves_its_weight_to_the_others():
  """MoE++ as released: of a token's two choices the other one has all, of two zero experts nobody has any."""
  name = {'name': 'gating_residual', 'k': 2}
  x = tokens()
  plain, without = (zero_layer(name | more) for more in ({}, {'renorm_excluding_zero': 1}))
  before, after = plain.router(x), without.router(x)
  np.testing.assert_array_equal(after.expert, before.expert)
  zero, weight = (np.asarray(v).reshape(-1, 2) for v in (after.expert == 7, after.weight))
  assert 0 < zero.sum() < len(zero)
  assert (weight[zero] == 0).all()
  np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-6)
  raw = np.asarray(before.weight).reshape(-1, 2)
  neither = ~zero.any(1)
  np.testing.assert_allclose(
    weight[neither], raw[neither] / raw[neither].sum(1)[:, None], rtol=1e-5
  )
  alone = zero_layer(name | {'renorm_excluding_zero': 7})  # but the first of them all
  kernel = alone.router.scorer.kernel
  kernel[...] = jnp.zeros_like(kernel[...]).at[:, 0].set(-5.0)
  assert float(jnp.abs(alone(jnp.abs(x))[0]).max()) == 0
  with pytest.raises(
    ValueError, match='renorm_excluding_zero=8 with num_experts=8: accepted are 0'
  ):
    zero_layer(name | {'renorm_excluding_zero': 8})


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


@pytest.mark.parametrize(
  ('zero_experts', 'message'),
  [
    ({'nil': 1}, "zero_experts kind 'nil': accepted are 'copy'"),
    ({'copy': -1}, r"zero_experts\['copy'\]=-1: accepted are integers from 0"),
  ],
)
def test_bad_kinds_and_counts_are_refused_in_one_sentence(zero_experts, message):
  with pytest.raises(ValueError, match=message):
    MoE(D, 6, 4, zero_experts=zero_experts, rngs=nnx.Rngs(0))


def test_zero_experts_need_rows():
  with pytest.raises(ValueError, match='zero_experts with a soft router'):
    MoE(D, 6, 4, 'soft', zero_experts={'copy': 1}, rngs=nnx.Rngs(0))(tokens())


def test_experts_without_computation_cost_no_flops():
  """Two choices among four experts and four without computation: one expert works on a token on average, and the router
  has eight columns of eight."""
  layer = zero_layer()
  assert layer.rows_per_token(6) == 1
  assert layer.active_share(6) == 1 / 4
  assert layer.flops_per_token(6) == {'router': 2 * D * 8, 'experts': 3 * 2 * D * 6}
