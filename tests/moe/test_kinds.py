"""Kinds of mixtures by name: each by its definition, with its parameters and FLOPs counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, make_router, oracle
from moejax.moe.deep import DeepMoE
from moejax.moe.experts import Experts
from moejax.moe.kinds import BARE, KINDS, UNMOVED, make_layer
from moejax.moe.losses import LOSSES
from moejax.moe.widths import diversify, parts_of

D, F, E, S = 8, 12, 4, 5


def tokens():
  return jax.random.normal(jax.random.key(1), (2, S, D))


def check_close(got, want, tolerance=1e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=tolerance)


def compiled(layer, x):
  graph, state = nnx.split(layer)
  return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def gradients(f, layer, x):
  graph, state = nnx.split(layer)
  target = jax.random.normal(jax.random.key(3), x.shape)
  loss = lambda state, x: (f(nnx.merge(graph, state), x) * target).sum()
  return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)


def test_experts_of_unlike_widths_are_those_of_one_width_side_by_side():
  """HMoE with widths 1 to 4, value and gradient against experts whose hidden layers are put together."""

  def by_experts(layer, x):
    bank, first, experts = layer.experts, 0, []
    for count in (1, 2, 3, 4):
      own = range(first, first + count)
      experts.append(lambda x, own=own: sum(bank.expert(i)(x) for i in own))
      first += count
    return oracle.moe(x, layer.router(x), experts)

  layer, x = MoE(D, 10, E, widths=(2, 4, 6, 8), losses={}, rngs=nnx.Rngs(0)), tokens()
  assert layer.experts.w_up.shape == (10, D, 4)  # 40 hidden units in 10 parts
  check_close(gradients(lambda layer, x: layer(x)[0], layer, x), gradients(by_experts, layer, x))
  assert layer.flops_per_token(S) == MoE(D, 10, E, rngs=nnx.Rngs(0)).flops_per_token(S)
  assert parts_of((9, 11, 13, 15, 17, 19, 21, 23), 8, 32)[1] == 2
  with pytest.raises(ValueError, match=r'widths=\(1, 2\): accepted are 4 integers from 1'):
    MoE(D, F, E, widths=(1, 2), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='of 7 parts do not divide num_experts'):
    MoE(D, F, E, widths=(1, 2, 3, 1), rngs=nnx.Rngs(0))


def test_the_parameter_penalty_has_the_published_value():
  """HMoE, sizes 1 to 4 over their mean on the logits of the golden table: 1.578059, twice `cost_balance` with k = 2."""
  table = [[2.0, 1.0, 0.0, -1.0], [1.5, 1.4, 0.2, 0.1], [0.3, 2.2, 0.1, -0.5]]
  table += [[1.8, -0.2, 0.9, 0.4], [2.5, 0.6, -0.3, 0.0], [0.0, 0.1, 0.2, 0.3]]
  router = make_router('top_k', d_model=4, num_experts=4, rngs=nnx.Rngs(0))
  router.scorer.kernel[...] = jnp.eye(4)
  layer = MoE(4, 10, 4, router, widths=(1, 2, 3, 4), rngs=nnx.Rngs(0))
  stats = compiled(layer, jnp.asarray([table]))[1].stats
  assert 2 * float(LOSSES['cost_balance'](stats)) == pytest.approx(1.578059, abs=1e-5)


def residual(**options):
  router = {'name': 'top_k', 'k': 1}
  return make_layer('residual', D, F, E, router, losses={}, options=options, rngs=nnx.Rngs(0))


def test_a_mixture_around_a_core_starts_as_the_dense_layer_and_its_router_learns():
  """Residuals zero and weight one: exactly the core (Residual MoE, k = 1), while gradients see the router's weights."""
  layer, x = residual(forward_one=True), tokens()
  check_close(compiled(layer, x)[0], layer.core.expert(0)(x))
  value, (by_state, by_x) = gradients(lambda layer, x: layer(x)[0], layer, x)
  assert float(jnp.abs(by_state.router.scorer.kernel[...]).max()) > 1e-4
  weighed = gradients(lambda layer, x: layer(x)[0], residual(), x)
  assert abs(float(weighed[0] - value)) > 1e-2
  check_close((by_state, by_x), weighed[1])


def test_weight_one_is_refused_where_there_are_no_weights_of_rows():
  layer = make_layer('residual', D, F, E, 'soft', options={'forward_one': True}, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='forward_one with a soft router: accepted are routers that'):
    layer(tokens())


def test_an_expert_is_the_core_and_its_own_residual():
  def by_sum(layer, x):
    own, core = (nnx.split(bank)[1] for bank in (layer.experts, layer.core))
    bank = nnx.merge(nnx.split(layer.experts)[0], jax.tree.map(lambda a, b: a + b[:1], own, core))
    return oracle.moe(x, layer.router(x), bank)

  layer, x = residual(core_noise=0.5), tokens()
  check_close(gradients(lambda layer, x: layer(x)[0], layer, x), gradients(by_sum, layer, x))


def test_stacked_mixtures_by_definition_and_of_one_expert_a_plain_network():
  def by_loops(layer, x):
    for part in (layer.first, layer.second):
      h = jnp.maximum(x @ part.gate_in[...] + part.gate_in_offset[...][None, None], 0)
      gate = jax.nn.softmax(h @ part.gate_out[...] + part.gate_out_offset[...][None, None], -1)
      outputs = [jnp.maximum(x @ part.kernel[...][e], 0) for e in range(part.kernel.shape[0])]
      x = sum(gate[..., e : e + 1] * y for e, y in enumerate(outputs))
    return x

  layer, x = DeepMoE(D, F, 3, gate_width=5, rngs=nnx.Rngs(0)), tokens()
  check_close(gradients(lambda layer, x: layer(x)[0], layer, x), gradients(by_loops, layer, x))
  one = DeepMoE(D, F, 1, rngs=nnx.Rngs(0))
  want = jax.nn.relu(jax.nn.relu(x @ one.first.kernel[...][0]) @ one.second.kernel[...][0])
  y, aux = compiled(one, x)
  check_close(y, want)
  assert aux.stats.prob_e.shape == (2,)


@pytest.mark.parametrize('kind', sorted(set(KINDS) - {'nested'}))  # see tests/moe/test_nested.py
def test_every_kind_keeps_padding_out_and_later_tokens_from_earlier_ones(kind):
  options = {'peer': {'heads': 2, 'k': 2, 'query_width': 4}, 'multi_head': {'heads': 2}}
  layer = make_layer(
    kind, D, F, E, {'name': 'top_k', 'k': 2}, options=options.get(kind), rngs=nnx.Rngs(0)
  )
  graph, state = nnx.split(layer)
  apply = jax.jit(lambda x, mask: nnx.merge(graph, state)(x, Context(mask=mask)))
  x, mask = tokens(), jnp.array([[True] * S, [True] * 3 + [False] * 2])
  y, aux = apply(jnp.where(mask[..., None], x, jnp.nan), mask)
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((y, aux)))
  assert layer.flags.prefix_safe
  changed = apply(x.at[:, 3:].set(5.0), mask)[0]
  np.testing.assert_allclose(changed[:, :3], y[:, :3], atol=1e-5)
  assert 0 < layer.active_share(S) <= 1


@pytest.mark.parametrize(
  ('kind', 'options', 'share', 'flops'),
  [
    ('experts', {}, 0.5, 2 * D * E + 2 * 3 * 2 * D * F),
    ('residual', {}, 0.5, 2 * D * E + 2 * 3 * 2 * D * F),
    # two sub-tokens of half the width: as much work of experts, and two matrices around it
    ('multi_head', {'heads': 2}, 1.0, 2 * D * E + 2 * 3 * 2 * D * F + 2 * 2 * D * D),
    # two mixtures of half the width
    ('cartesian', {}, 0.5, 2 * 2 * D * E + 2 * 3 * 2 * D * F),
    # queries 2 x 4 wide, two keys a half, four neurons
    ('peer', {'heads': 2, 'k': 2, 'query_width': 4}, 1.0, 2 * D * 8 + 2 * 2 * 8 + 4 * 4 * D),
    ('deep', {'gate_width': 3}, 1.0, 2 * 3 * (D + F + 2 * E) + 2 * 2 * E * D * F),
  ],
)
def test_work_and_active_parameters_of_a_token_counted_by_hand(kind, options, share, flops):
  router = {'name': 'top_k', 'k': 2}
  layer = make_layer(kind, D, F, E, router, options=options, rngs=nnx.Rngs(0))
  assert layer.active_share(S) == share
  assert sum(layer.flops_per_token(S).values()) == flops


def test_unlike_capacities_are_kept():
  """MoE++: tau 0.75 for two experts and 1 for two without computation: C = ceil(1.1 * 2 * 40 * share / 3.5)."""
  options = {'k': 2, 'capacity_factor': 1.1, 'capacity_shares': (0.75, 0.75, 1, 1)}
  router = make_router('top_k', d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
  router.scorer.kernel[...] = jnp.zeros((D, E)).at[:, 0].set(9.0).at[:, 2].set(5.0)
  x = jnp.abs(jax.random.normal(jax.random.key(0), (1, 40, D)))
  kept = np.bincount(np.asarray(router(x).expert), minlength=E + 1)
  assert kept.tolist() == [19, 0, 26, 0, 80 - 19 - 26]
  with pytest.raises(
    ValueError, match=r'capacity_shares=\(1, 2\): accepted are 4 positive numbers'
  ):
    make_router(
      'top_k',
      d_model=D,
      num_experts=E,
      rngs=nnx.Rngs(0),
      capacity_factor=1.0,
      capacity_shares=(1, 2),
    )


def test_diversified_experts_are_one_expert_with_other_holes():
  one, experts = Experts(D, F, 1, rngs=nnx.Rngs(0)), Experts(D, F, E, rngs=nnx.Rngs(1))
  diversify(experts, one, 0.25, jax.random.key(2))
  weights, source = np.asarray(experts.w_up[...]), np.asarray(one.w_up[...])
  assert ((weights == 0) | (weights == source)).all()
  assert 0.15 < (weights == 0).mean() < 0.35
  assert (weights[0] != weights[1]).any()
  with pytest.raises(ValueError, match='rate=1.0: accepted are numbers from 0 to below 1'):
    diversify(experts, one, 1.0, jax.random.key(2))


def test_what_a_kind_does_not_have_is_refused_in_one_sentence():
  make = lambda kind, **more: make_layer(kind, D, F, E, 'top_k', rngs=nnx.Rngs(0), **more)
  with pytest.raises(ValueError, match="kind='dense': accepted are 'experts', 'residual'"):
    make('dense')
  with pytest.raises(ValueError, match="option 'heads' of kind 'cartesian': accepted are none"):
    make('cartesian', options={'heads': 2})
  with pytest.raises(ValueError, match="num_shared=1 with kind 'peer': accepted is 0"):
    make('peer', num_shared=1)


@pytest.mark.parametrize('kind', sorted(BARE))
def test_losses_that_a_kind_refuses_are_those_without_a_gradient(kind):
  """A router of its own has no noise, no clusters, and in stacked mixtures every expert works on every token."""
  options = {'peer': {'heads': 2, 'k': 2, 'query_width': 4}}.get(kind)
  make = lambda **more: make_layer(kind, D, 16, E, None, options=options, rngs=nnx.Rngs(0), **more)
  graph, state = nnx.split(make(losses={}))

  def values(state):
    stats = nnx.merge(graph, state)(tokens())[1].stats
    return {name: loss(stats) for name, loss in LOSSES.items()}

  moved = set()
  for name, of in jax.jit(jax.jacrev(values))(state).items():
    if max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(of)) > 1e-6:
      moved.add(name)
  assert moved == set(LOSSES) - set(UNMOVED[kind])
  for name in UNMOVED[kind]:
    with pytest.raises(
      ValueError, match=f"losses.{name}=0.1 with kind '{kind}', where it has no g"
    ):
      make(losses={name: 0.1})
    make(losses={name: 0.0})


@pytest.mark.parametrize('kind', sorted(BARE))
def test_a_kind_with_a_router_of_its_own_takes_no_other(kind):
  make = lambda router, size=16: make_layer(kind, size, size, E, router, rngs=nnx.Rngs(0))
  router = make_router('top_k', d_model=16, num_experts=E, rngs=nnx.Rngs(0))
  for given, named in (
    ('switch', "name='switch'"),
    ({'name': 'top_k', 'k': 1}, 'k=1'),
    ({'name': 'top_k', 'weighting': 'sigmoid_norm'}, "weighting='sigmoid_norm'"),
    (router, "name='Router'"),
  ):
    with pytest.raises(ValueError, match=f"^router.{named} with kind '{kind}', which has its own"):
      make(given)
