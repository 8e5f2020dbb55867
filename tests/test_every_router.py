"""One table of routers, one list of properties: every row has every property, in value and gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import Assignment, Context, MoE, SoftPlan, oracle
from moejax.moe.dispatch import DISPATCHES
from moejax.moe.weighting import WEIGHTINGS
from moejax.routers import ROUTERS

B, S, D, E, F = 2, 5, 8, 4, 6

ROWS = {
  'top_k': {'name': 'top_k', 'k': 2},
  'top_1': {'name': 'top_k', 'k': 1},
  'noisy': {'name': 'top_k', 'k': 2, 'noise_std': 1.0, 'jitter': 0.1},
  'bias': {
    'name': 'top_k',
    'k': 2,
    'weighting': 'sigmoid_norm',
    'route_scale': 2.5,
    'balance_bias': True,
  },
  'token_major': {'name': 'top_k', 'capacity_factor': 0.6},
  'token_major_sequence': {'name': 'top_k', 'capacity_factor': 0.6, 'capacity_group': 'sequence'},
  'choice_major': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'choice_major'},
  'renormalised': {'name': 'top_k', 'capacity_factor': 0.6, 'renorm_after_drop': True},
  'batch_prioritised': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'score'},
  'random_priority': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'random'},
  'threshold': {
    'name': 'gshard',
    'second_policy': 'threshold',
    'second_threshold': 0.4,
    'capacity_factor': 0.6,
    'eval_capacity_factor': 0.6,
  },
  'switch': {'name': 'switch', 'capacity_factor': 0.6, 'eval_capacity_factor': 0.6},
  'gshard': {'name': 'gshard', 'capacity_factor': 0.6, 'eval_capacity_factor': 0.6},
  'expert_choice': {'name': 'expert_choice', 'capacity_factor': 1.5},
  'expert_choice_batch': {'name': 'expert_choice', 'group': 'batch'},
  'expert_choice_position': {'name': 'expert_choice', 'group': 'position'},
  'expert_choice_tokens': {'name': 'expert_choice', 'softmax_over': 'tokens', 'noise_std': 1.0},
  'expert_choice_capped': {'name': 'expert_choice', 'group': 'batch', 'cap': 2},
  'soft': {'name': 'soft', 'slots': 2},
  'dense': {'name': 'dense'},
} | {weighting: {'name': 'top_k', 'k': 2, 'weighting': weighting} for weighting in WEIGHTINGS}

every_router = pytest.mark.parametrize('row', ROWS)


def make_layer(row, **options) -> MoE:
  options = {'losses': {}, 'num_experts': E} | options
  layer = MoE(D, F, router=dict(ROWS[row]), rngs=nnx.Rngs(params=0), **options)
  if layer.router.bias is not None:
    bias = jnp.array([0.3, -0.2, 0.0, 0.1], jnp.float32)
    layer.router.bias = type(layer.router.bias)(bias)
  return layer


def tokens(seed=1, shape=(B, S, D), dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def context(train=True, **fields) -> Context:
  return Context(rng=jax.random.key(7), train=train, **fields)


def outputs(layer, x, ctx=None):
  return layer(x, context() if ctx is None else ctx)[0]


def widen(layer: MoE) -> MoE:
  graph, state = nnx.split(layer)
  layer = nnx.merge(graph, jax.tree.map(lambda w: w.astype(jnp.float64), state))
  layer.experts.dtype = jnp.dtype(jnp.float64)
  return layer


def value_and_gradient(layer, x, apply):
  """Value, and gradients by x and every parameter, of a fixed random projection of `apply(layer, x)`."""
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  target = jax.random.normal(jax.random.key(3), x.shape, x.dtype)

  def scalar(params, x):
    y = apply(nnx.merge(graph, params, rest), x)
    return (y * target).sum(), y

  (_, y), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(params, x)
  return y, nnx.to_pure_dict(gradients[0]), gradients[1]


@functools.cache
def by_layer(row, dispatch='fused'):
  """Value and gradient of a row in float32; several properties are read off it."""
  return value_and_gradient(make_layer(row, dispatch=DISPATCHES[dispatch]), tokens(), outputs)


def by_oracle(layer, x):
  return oracle.moe(x, layer.router(x, context()), layer.experts)


def rotated(layer: MoE) -> MoE:
  """The same layer with every expert's weights moved to its neighbour."""
  graph, state = nnx.split(layer)
  state = nnx.merge(graph, state)
  experts = jax.tree.map(lambda w: jnp.roll(w, 1, 0), nnx.split(layer.experts)[1])
  nnx.update(state.experts, experts)
  return state


def check_close(got, want, tolerance):
  """Largest difference, relative to the largest entry of `want`."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = max(float(jnp.abs(b).max()), 1e-3)
    assert float(jnp.abs(a - b).max()) <= tolerance * scale


def test_the_table_has_every_router_and_weighting():
  assert {row['name'] for row in ROWS.values()} == set(ROUTERS) == set(moejax.router_names())
  assert {row.get('weighting') for row in ROWS.values()} >= set(WEIGHTINGS)


@every_router
def test_value_and_gradient_are_the_oracles_in_float32(row):
  layer, x = make_layer(row), tokens()
  got = by_layer(row)
  want = value_and_gradient(layer, x, by_oracle)
  check_close(got, want, 1e-5)
  # the check can fail: with experts moved by one the output is far off
  far = jnp.abs(outputs(rotated(layer), x) - want[0]).max()
  near = jnp.abs(got[0] - want[0]).max()
  assert far > 10 * near
  assert far > 1e-2 * jnp.abs(want[0]).max()


@every_router
@pytest.mark.usefixtures('x64')
def test_value_and_gradient_are_the_oracles_in_float64(row):
  layer, x = widen(make_layer(row)), tokens(dtype=jnp.float64)
  got = value_and_gradient(layer, x, outputs)
  assert got[0].dtype == jnp.float64
  check_close(got, value_and_gradient(layer, x, by_oracle), 1e-10)


@every_router
@pytest.mark.parametrize('dispatch', sorted(set(DISPATCHES) - {'fused'}))
def test_every_dispatch_is_the_fused_one(row, dispatch):
  check_close(by_layer(row, dispatch), by_layer(row), 1e-5)


@every_router
def test_jit_is_eager(row):
  layer, x = make_layer(row), tokens()
  graph, state = nnx.split(layer)
  y, aux = jax.jit(lambda state, x: nnx.merge(graph, state)(x, context()))(state, x)
  check_close((y, aux), layer(x, context()), 1e-5)


@functools.cache
def outputs_of_many(row, train):
  """The compiled layer on `[B, S, D]`, called for both flags."""
  layer = make_layer(row)
  return jax.jit(lambda x: layer(x, context(train))[0])


def changes(row, train, perturb, where) -> float:
  """Largest change of the outputs selected by `where` when `perturb` rewrites the input; over 20 draws."""
  call = outputs_of_many(row, train)
  shape = (4, 8, D)
  worst = 0.0
  for seed in range(20):
    x = tokens(100 + seed, shape)
    other = perturb(x, tokens(200 + seed, shape))
    worst = max(worst, float(jnp.abs(where(call(x)) - where(call(other))).max()))
  return worst


@every_router
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_later_tokens_change_earlier_outputs_only_where_the_flag_says_so(row, train):
  layer = make_layer(row)
  safe = layer.router.flags.prefix_safe_train if train else layer.router.flags.prefix_safe_eval
  change = changes(row, train, lambda x, new: x.at[1, 4:].set(new[1, 4:]), lambda y: y[1, :4])
  assert (change < 1e-6) if safe else (change > 1e-3)


@every_router
@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_other_sequences_change_outputs_only_where_the_flag_says_so(row, train):
  layer = make_layer(row)
  others = jnp.array([0, 1, 3])
  change = changes(row, train, lambda x, new: x.at[others].set(new[others]), lambda y: y[2])
  assert (change < 1e-6) if layer.router.flags.batch_free else (change > 1e-3)


@every_router
def test_evaluation_needs_no_key_and_ignores_it(row):
  layer, x = make_layer(row), tokens()
  assert layer.router.flags.deterministic_eval
  plain = outputs(layer, x, Context())
  keyed = outputs(layer, x, Context(rng=jax.random.key(5)))
  np.testing.assert_array_equal(plain, keyed)


@every_router
def test_the_task_moves_the_router_and_every_used_expert(row):
  layer, x = make_layer(row), tokens(shape=(4, 8, D))
  _, gradients, _ = value_and_gradient(layer, x, outputs)
  for name, gradient in gradients['router']['scorer'].items():
    assert (float(jnp.abs(gradient).max()) > 1e-4) == layer.router.flags.trains_router, name
  used_e = layer(x, context())[1].stats.kept_e > 0
  moved_e = jnp.abs(gradients['experts']['w_up']).max((1, 2)) > 0
  np.testing.assert_array_equal(moved_e, used_e)


@every_router
def test_padding_is_invisible_whatever_it_holds(row):
  """NaN in padded rows reaches no output, no gradient and no statistic."""
  layer = make_layer(
    row, losses={'balance': 1.0, 'z': 1.0, 'importance': 1.0, 'sequence_balance': 1.0}
  )
  mask = jnp.array([[True] * S, [True] * 3 + [False] * 2])
  clean = jnp.where(mask[..., None], tokens(), 0)
  dirty = jnp.where(mask[..., None], clean, jnp.nan)

  def apply(layer, x):
    y, aux = layer(x, context(mask=mask))
    return y + sum(aux.losses.values())

  want, got = value_and_gradient(layer, clean, apply), value_and_gradient(layer, dirty, apply)
  assert jnp.isfinite(want[0]).all()
  check_close(got, want, 1e-6)
  y, aux = layer(dirty, context(mask=mask))
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert float(aux.stats.tokens) == 8
  assert float(aux.stats.prob_e.sum()) == pytest.approx(8, rel=1e-5)


@every_router
def test_one_expert_alone_is_a_dense_layer_up_to_the_weights(row):
  """All experts equal: every token's output is its weight sum times the one expert's output."""
  layer, x = make_layer(row), tokens()
  nnx.update(
    layer.experts,
    jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), nnx.split(layer.experts)[1]),
  )
  plan = layer.router(x, context())
  if isinstance(plan, SoftPlan):
    pytest.skip('a soft plan mixes tokens before the experts')
  weight_t = jnp.zeros(B * S).at[plan.token].add(plan.weight)
  want = weight_t.reshape(B, S, 1) * layer.experts.expert(0)(x)
  check_close(outputs(layer, x), want, 1e-5)


@every_router
def test_a_plan_keeps_its_own_contract(row):
  """Indices in range, dropped rows weigh nothing, chunks of rows stay in their chunk of tokens."""
  layer, x = make_layer(row), tokens()
  plan = layer.router(x, context())
  if isinstance(plan, SoftPlan):
    np.testing.assert_allclose(plan.dispatch.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.combine.sum((2, 3)), 1, rtol=1e-5)
    return
  assert isinstance(plan, Assignment)
  assert plan.token.dtype == plan.expert.dtype == plan.chosen.dtype == jnp.int32
  assert ((plan.token >= 0) & (plan.token < B * S)).all()
  assert ((plan.expert >= 0) & (plan.expert <= E)).all()
  assert (jnp.where(plan.expert == E, plan.weight, 0) == 0).all()
  assert ((plan.expert == plan.chosen) | (plan.expert == E)).all()
  rows, chunk = plan.token.size // plan.groups, B * S // plan.groups
  np.testing.assert_array_equal(plan.token // chunk, jnp.arange(plan.token.size) // rows)
  pairs = plan.token * (E + 1) + plan.expert
  kept = np.asarray(pairs[plan.expert < E])
  assert len(set(kept.tolist())) == len(kept)  # no token twice at one expert


@every_router
def test_narrow_activations_do_not_narrow_the_router(row):
  """bfloat16 inputs choose what the same numbers in float32 choose, weights and losses stay float32."""
  layer, x = make_layer(row, dtype=jnp.bfloat16), tokens().astype(jnp.bfloat16)
  narrow, wide = layer.router(x, context()), layer.router(x.astype(jnp.float32), context())
  jax.tree.map(np.testing.assert_array_equal, narrow, wide)
  y, aux = layer(x, context())
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(aux)} == {jnp.dtype(jnp.float32)}
  want = outputs(make_layer(row), x.astype(jnp.float32))
  check_close(y.astype(jnp.float32), want, 0.05)


@every_router
def test_statistics_add_up(row):
  """The stats of two calls on halves that do not interact are the stats of the joined call."""
  layer = make_layer(row)
  if not layer.router.flags.batch_free or layer.router.scorer.__dict__.get('noise_std'):
    pytest.skip('halves interact, or noise is drawn by shape')
  x = tokens()
  halves = [layer(x[i : i + 1], context())[1].stats for i in range(B)]
  check_close(jax.tree.map(jnp.add, *halves), layer(x, context())[1].stats, 1e-5)


def test_dropless_token_choice_is_permutation_equivariant():
  layer, x = make_layer('top_k'), tokens()
  order = jax.random.permutation(jax.random.key(0), S)
  check_close(outputs(layer, x[:, order]), outputs(layer, x)[:, order], 1e-6)


def test_ties_go_to_the_lowest_index():
  layer = make_layer('top_k')
  plan = layer.router.assign(
    dataclasses.replace(layer.router.scores(tokens(), Context()), select=jnp.zeros((B, S, E))),
    Context(),
  )
  np.testing.assert_array_equal(plan.chosen.reshape(B, S, 2), np.broadcast_to([0, 1], (B, S, 2)))
