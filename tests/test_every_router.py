"""One table of routers, one list of properties: every row has every property, in value and gradient."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import Assignment, Context, MoE, SoftPlan, oracle
from moejax.moe.dispatch import DISPATCHES
from moejax.routers import ROUTERS, RouterBias
from moejax.routers.weighting import WEIGHTINGS

B, S, D, E, F, V = 2, 5, 8, 4, 6, 16

ROWS = {
  'top_k': {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk_norm'},
  'top_1': {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk'},
  'sigmoid': {'name': 'top_k', 'k': 1, 'weighting': 'sigmoid'},
  'stop_gradient': {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk_norm_sg'},
  'unweighted': {'name': 'top_k', 'k': 2, 'weighting': 'unweighted'},
  'noisy': {'name': 'top_k', 'k': 2, 'noise_std': 1.0, 'jitter': 0.1},
  'bias': {
    'name': 'top_k',
    'k': 2,
    'weighting': 'sigmoid_norm',
    'route_scale': 2.5,
    'balance_bias': True,
  },
  'token_major': {'name': 'top_k', 'capacity_factor': 0.6, 'weighting': 'topk_softmax'},
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
  'expert_choice_position_pairs': {
    'name': 'expert_choice',
    'group': 'position',
    'group_size': 2,
  },
  'soft': {'name': 'soft', 'slots': 2},
  'soft_combine': {'name': 'soft', 'slots': 2, 'mixing': 'learned_combine'},
  'dense': {'name': 'dense'},
  'hash': {'name': 'hash', 'of': 'bigram'},
  'sinkhorn': {'name': 'sinkhorn'},
  'sinkhorn_expert_choice': {'name': 'sinkhorn_expert_choice', 'capacity_factor': 1.5},
  'base': {'name': 'base'},
  'noisy_top_k': {'name': 'noisy_top_k', 'k': 2},
  'cosine': {'name': 'cosine', 'width': 3},
  'group_limited': {'name': 'group_limited', 'groups': 2, 'limit': 1},
  'modified_softmax': {'name': 'modified_softmax'},
  'mixture_of_tokens': {'name': 'mixture_of_tokens', 'group_size': 2, 'slots': 2},
  'thor': {'name': 'thor'},
  'smoe_dropout': {'name': 'smoe_dropout', 'k_min': 1, 'k_max': 3},
  'ewa': {'name': 'ewa'},
  'mask_moe': {'name': 'mask_moe', 'k': 2, 'visible': 3, 'counts': tuple(range(V, 0, -1))},
  'vmoe': {'name': 'vmoe', 'capacity_factor': 0.6},
  'top_p': {'name': 'top_p', 'p': 0.5, 'eval_p': 0.3},
  'top_p_renormalised': {'name': 'top_p', 'p': 0.5, 'renorm': True, 'max_k': 3},
  'ada_moe': {'name': 'ada_moe', 'k': 3, 'nulls': 3},
  'dense_to_sparse': {'name': 'dense_to_sparse', 'threshold': 0.1},
  'dense_to_sparse_plain': {
    'name': 'dense_to_sparse',
    'tau_max': 1.0,
    'tau_min': 0.1,
    'decay': 'exponential',
    'threshold': 0.1,
    'tempered': False,
  },
  'ds_moe': {'name': 'ds_moe', 'eval_k': 2},
  'ds_moe_threshold': {'name': 'ds_moe', 'eval_threshold': 0.3},
  'smile': {'name': 'smile', 'nodes': 2},
  'locmoe': {'name': 'locmoe'},
  'moec': {'name': 'moec', 'width': 3},
  'rmoe': {'name': 'rmoe', 'width': 3},
  'gating_residual': {'name': 'gating_residual'},
  'pre_gated': {'name': 'pre_gated'},
  'read_me': {'name': 'read_me'},
  'm3vit': {'name': 'm3vit'},
  'm3vit_embedding': {'name': 'm3vit', 'gate': 'embedding', 'width': 3, 'noise_std': 0.0},
  'family': {'name': 'family'},
  'speech_moe': {'name': 'speech_moe', 'width': E},
  'time_moe': {'name': 'time_moe', 'width': 4, 'noise_std': 0.1},
  'space_moe': {'name': 'space_moe', 'width': E},
  'image': {'name': 'image'},
  'spatial': {'name': 'spatial', 'positions': 8},
  'kamoe': {'name': 'kamoe', 'width': 6, 'cells': 3},
}

ROWS |= {name: {'name': name} for name in ROUTERS if ':' in name}  # pytest --router module:function


ONE_OF_EACH = tuple({options['name']: row for row, options in ROWS.items()}.values())
"""A row for each router, the last one."""

SCORERS = ('rmoe', 'gating_residual', 'pre_gated', 'read_me', 'm3vit', 'm3vit_embedding', 'family')
SCORERS = (*SCORERS, 'speech_moe', 'time_moe', 'image', 'spatial', 'kamoe')
"""Rows that are `top_k` or `dense` with other logits: what is done with these is tested there in all dispatches."""


@pytest.fixture(params=list(ROWS), scope='module')
def row(request):
  """A row of the table. All its properties are tested before the next row's.

  Then its programs are let go; those of single operations, which all rows share, only before their memory maps reach
  Linux's limit of 65,530 a process.
  """
  yield request.param
  program.cache_clear()
  maps = pathlib.Path('/proc/self/maps')
  if not maps.exists() or maps.read_bytes().count(b'\n') > 10_000:
    jax.clear_caches()


LOSSES = {'balance': 1.0, 'z': 1.0, 'importance': 1.0, 'sequence_balance': 1.0}


def make_layer(row, seed=0, **options) -> MoE:
  layer = MoE(D, F, E, dict(ROWS[row]), losses=LOSSES, rngs=nnx.Rngs(seed), **options)
  if layer.router.bias is not None:
    layer.router.bias = RouterBias(jnp.array([0.3, -0.2, 0.0, 0.1], jnp.float32))
  return layer


@functools.cache
def unchanged_layer(row) -> MoE:
  """The layer, for tests that do not write to it."""
  return make_layer(row)


def tokens(seed=1, shape=(B, S, D), dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def ids(seed=5, shape=(B, S)):
  return jax.random.randint(jax.random.key(seed), shape, 0, V, jnp.int32)


def context(train=True, *, token_ids=None, **fields) -> Context:
  """All that a router may look at; what is known of a whole sequence is a function of its first ids.

  There is a mask unless a test asks for none: programs with and without one are not the same.
  """
  token_ids = ids() if token_ids is None else token_ids
  table = jax.random.normal(jax.random.key(8), (V, E))
  usual = {'rng': jax.random.key(7), 'train': train, 'progress': jnp.float32(0.4)}
  first = token_ids[:, :3]
  usual['shared'] = {'read_me': table[token_ids]}
  usual |= {'task': first[:, 0] % 2, 'time': first[:, 0] / V, 'domain': table[first[:, 0]]}
  usual |= {'text': table[first], 'mask': jnp.ones(token_ids.shape, bool)}
  maps = jax.random.uniform(jax.random.key(9), (V, token_ids.shape[1]))
  usual |= {'maps': maps[first]}
  return Context(**usual | fields, token_ids=token_ids)


def through(layer, x, context, apply):
  """The sum of `apply(x, plan)` over the layer's decisions: one, or with a state those of two layers in a row."""
  scores, plan = layer.router.route(x, context)
  if not layer.router.flags.has_state:
    return apply(x, plan)
  above = dataclasses.replace(context, state=scores.state)
  return apply(x, plan) + apply(x, layer.router.route(x, above)[1])


def by_layer(layer, x, context):
  y, aux = layer(x, context)
  if not layer.router.flags.has_state:
    return y, aux.losses, aux.stats
  above, second = layer(x, dataclasses.replace(context, state=aux.state))
  stats = dataclasses.replace(second.stats, kept_e=aux.stats.kept_e + second.stats.kept_e)
  return y + above, second.losses, stats


def by_oracle(layer, x, context):
  """The outputs by definition; losses and stats have golden values instead (tests/moe/test_golden.py)."""
  apply = lambda x, plan: oracle.moe(x, plan, layer.experts)
  return through(layer, x, context, apply), {}, None


@functools.cache
def program(row, apply=by_layer, gradient=True, **options):
  """`(layer, x, context) -> (y, losses, stats, gradients)`, compiled once for all properties of a row.

  Gradients are those of a fixed random projection of y plus all losses, by the parameters and by x.
  """
  graph = nnx.split(make_layer(row, **options), nnx.Param, ...)[0]

  def scalar(params, x, rest, context):
    y, losses, stats = apply(nnx.merge(graph, params, rest), x, context)
    target = jax.random.normal(jax.random.key(3), y.shape, y.dtype)
    return (y * target).sum(), (y, losses, stats)

  def forward(params, x, rest, context):
    return *scalar(params, x, rest, context)[1], None

  def both(params, x, rest, context):
    out, gradients = jax.grad(scalar, (0, 1), has_aux=True)(params, x, rest, context)[::-1]
    return *out, (nnx.to_pure_dict(gradients[0]), gradients[1])

  compiled = jax.jit(both if gradient else forward)

  def call(layer, x, context):
    _, params, rest = nnx.split(layer, nnx.Param, ...)
    return compiled(params, x, rest, context)

  return call


def outputs(row, x, context) -> jax.Array:
  return program(row, gradient=False)(unchanged_layer(row), x, context)[0]


def widen(layer: MoE) -> MoE:
  graph, state = nnx.split(layer)

  def wide(leaf):
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  return nnx.merge(graph, jax.tree.map(wide, state))


def rotated(layer: MoE) -> MoE:
  """The same layer with every expert's weights moved to its neighbour."""
  nnx.update(layer.experts, jax.tree.map(lambda w: jnp.roll(w, 1, 0), nnx.split(layer.experts)[1]))
  return layer


def check_close(got, want, tolerance):
  """Largest difference, relative to the largest entry of `want`."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    scale = max(float(jnp.abs(b).max()), 1e-3)
    assert float(jnp.abs(a - b).max()) <= tolerance * scale


def test_the_table_has_every_router_and_weighting():
  assert {row['name'] for row in ROWS.values()} == set(ROUTERS) == set(moejax.router_names())
  assert {row.get('weighting') for row in ROWS.values()} >= set(WEIGHTINGS)


def test_value_and_gradient_are_the_oracles_in_float32(row):
  layer, x = make_layer(row), tokens()
  y, _, _, gradients = program(row)(layer, x, context())
  want, _, _, want_gradients = program(row, by_oracle)(layer, x, context())
  check_close((y, gradients), (want, want_gradients), 1e-5)
  # the check can fail: with experts moved by one the output is far off
  far = jnp.abs(program(row)(rotated(layer), x, context())[0] - want).max()
  assert far > 10 * jnp.abs(y - want).max()
  assert far > 1e-2 * jnp.abs(want).max()


@pytest.mark.usefixtures('x64')
def test_value_and_gradient_are_the_oracles_in_float64(row):
  """A step that is computed in float32 shows here. No mask: that is not the program of the other tests."""
  layer, x = widen(make_layer(row)), tokens(dtype=jnp.float64)
  y, _, _, gradients = program(row, dtype=jnp.float64)(layer, x, context(mask=None))
  assert y.dtype == jnp.float64
  oracles = program(row, by_oracle, dtype=jnp.float64)
  want, _, _, want_gradients = oracles(layer, x, context(mask=None))
  check_close((y, gradients), (want, want_gradients), 1e-10)


@pytest.mark.parametrize('row', [row for row in ROWS if row not in SCORERS])
@pytest.mark.parametrize('dispatch', sorted(set(DISPATCHES) - {'fused'}))
def test_every_dispatch_is_the_fused_one(row, dispatch):
  layer, x = make_layer(row), tokens()
  got = program(row, dispatch=DISPATCHES[dispatch])(layer, x, context())
  check_close(got, program(row)(layer, x, context()), 1e-5)


def test_jit_is_eager(row):
  layer, x = make_layer(row), tokens()
  check_close(program(row)(layer, x, context())[:3], by_layer(layer, x, context()), 1e-5)


def changes(row, train, perturb, where) -> float:
  """Largest change of the outputs selected by `where` when `perturb` rewrites tokens and ids; over 20 draws."""
  shape = (4, 8, D)
  worst = 0.0
  for seed in range(20):
    x = tokens(100 + seed, shape)
    other = perturb(x, tokens(200 + seed, shape))
    x_ids = ids(100 + seed, shape[:2])
    other_ids = perturb(x_ids, ids(200 + seed, shape[:2]))
    before, after = (
      where(outputs(row, value, context(train, token_ids=value_ids)))
      for value, value_ids in ((x, x_ids), (other, other_ids))
    )
    worst = max(worst, float(np.abs(np.asarray(before) - np.asarray(after)).max()))
  return worst


@pytest.mark.parametrize('train', [True, False], ids=['train', 'eval'])
def test_later_tokens_change_earlier_outputs_only_where_the_flag_says_so(row, train):
  flags = make_layer(row).router.flags
  safe = flags.prefix_safe_train if train else flags.prefix_safe_eval
  change = changes(row, train, lambda x, new: x.at[1, 4:].set(new[1, 4:]), lambda y: y[1, :4])
  assert (change < 1e-6) if safe else (change > 1e-3)


def test_other_sequences_change_outputs_only_where_the_flag_says_so(row):
  """The flag promises both for training and for evaluation; some routers break it in training only."""
  flags = make_layer(row).router.flags
  others = jnp.array([0, 1, 3])

  def change(train):
    return changes(row, train, lambda x, new: x.at[others].set(new[others]), lambda y: y[2])

  worst = max(change(train=True), change(train=False))
  assert (worst < 1e-6) if flags.batch_free else (worst > 1e-3)


def test_evaluation_needs_no_key_and_ignores_it(row):
  """Where the flag says otherwise, a key is not needed either, but two keys give two outputs."""
  shape = (4, 8, D)
  x, x_ids = tokens(shape=shape), ids(shape=shape[:2])
  keyless = outputs(row, x, context(train=False, rng=None, token_ids=x_ids))
  keyed = outputs(row, x, context(train=False, token_ids=x_ids))
  if make_layer(row).router.flags.deterministic_eval:
    np.testing.assert_array_equal(keyless, keyed)
  else:
    assert float(jnp.abs(keyless - keyed).max()) > 1e-3
    again = outputs(row, x, context(train=False, rng=None, token_ids=x_ids))
    np.testing.assert_array_equal(keyless, again)


def test_the_task_moves_the_router_and_every_used_expert(row):
  layer = make_layer(row)
  _, _, stats, gradients = program(row)(layer, tokens(), context())
  parameters = gradients[0].get('router', {}).get('scorer', {})
  assert parameters or not layer.router.flags.trains_router
  for name, gradient in jax.tree_util.tree_leaves_with_path(parameters):
    moved = float(jnp.abs(gradient).max()) > 1e-4
    assert moved == layer.router.flags.trains_router, name
  moved_e = jnp.abs(gradients[0]['experts']['w_up']).max((1, 2)) > 0
  np.testing.assert_array_equal(moved_e, stats.kept_e[:E] > 0)


def test_padding_is_invisible_whatever_it_holds(row):
  """NaN in padded rows reaches no output, no gradient, no loss and no statistic."""
  layer = make_layer(row)
  mask = jnp.array([[True] * S, [True] * 3 + [False] * 2])
  clean = jnp.where(mask[..., None], tokens(), 0)
  dirty = jnp.where(mask[..., None], clean, jnp.nan)
  want = program(row)(layer, clean, context(mask=mask))
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
  got = program(row)(layer, dirty, context(mask=mask))
  check_close(got, want, 1e-6)
  y, _, stats, gradients = got
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert float(jnp.abs(gradients[1][1, 3:]).max()) == 0
  assert float(stats.tokens) == 8
  assert float(stats.prob_e.sum()) == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize('row', ['top_k', *(row for row in ONE_OF_EACH if row not in SCORERS)])
def test_decoding_one_token_at_a_time_is_one_pass_where_the_flag_says_so(row):
  """Every token as a sequence of its own, with its own part of the context, gets the same experts and weights."""
  layer, x = make_layer(row), tokens()
  flags, context_of_all = layer.router.flags, context(train=False, positions=POSITIONS)
  apart = context(train=False, token_ids=ids().reshape(-1, 1), positions=POSITIONS.reshape(-1, 1))
  usual = (
    'task',
    'time',
    'domain',
    'text',
    'maps',
  )  # of the whole sequence, for each of its tokens
  apart = dataclasses.replace(
    apart, **{name: jnp.repeat(getattr(context_of_all, name), S, 0) for name in usual}
  )
  if not flags.one_by_one:
    assert not (flags.prefix_safe_eval and flags.batch_free and flags.deterministic_eval) or (
      flags.needs_past
    )
    return
  graph, state = nnx.split(layer.router)
  route = jax.jit(lambda state, x, context: nnx.merge(graph, state)(x, context))
  one_pass = combine_weights(route(state, x, context_of_all))
  one_by_one = combine_weights(route(state, x.reshape(-1, 1, D), apart))
  np.testing.assert_allclose(one_by_one, one_pass, atol=1e-5)


POSITIONS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[None], (B, S))


def combine_weights(plan) -> np.ndarray:
  """`[T, E]`."""
  if isinstance(plan, SoftPlan):
    return np.asarray(plan.combine.sum(-1)).reshape(-1, plan.combine.shape[-2])
  weight_te = np.zeros((B * S, plan.num_experts + 1))
  np.add.at(weight_te, (np.asarray(plan.token), np.asarray(plan.expert)), np.asarray(plan.weight))
  return weight_te[:, :-1]


def test_what_is_saved_and_restored_routes_as_before(row):
  """Parameters, biases, tables and seeds as a pure dict of numpy arrays, which is what a checkpoint holds."""
  layer, x = make_layer(row), tokens()
  saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(layer)[1]))
  graph, state = nnx.split(make_layer(row, seed=1))
  nnx.replace_by_pure_dict(state, saved)
  restored = program(row)(nnx.merge(graph, state), x, context())
  for got, want in zip(
    jax.tree.leaves(restored), jax.tree.leaves(program(row)(layer, x, context())), strict=True
  ):
    np.testing.assert_array_equal(got, want)


def test_equal_experts_are_one_dense_layer_up_to_the_weights(row):
  """All experts equal: every token's output is its weight sum times the one expert's output."""
  layer, x = make_layer(row), tokens()
  state = nnx.split(layer.experts)[1]
  nnx.update(layer.experts, jax.tree.map(lambda w: jnp.broadcast_to(w[:1], w.shape), state))
  y, _, _, _ = program(row)(layer, x, context())
  expert = layer.experts.expert(0)

  def apply(x, plan):
    if isinstance(plan, SoftPlan) and plan.across:
      return oracle.moe(x, plan, [expert] * E)
    if isinstance(plan, SoftPlan):
      slots = expert(jnp.einsum('BSEP,BSD->BEPD', plan.dispatch, x))
      return jnp.einsum('BSEP,BEPD->BSD', plan.combine, slots)
    weight_t = jnp.zeros(B * S).at[plan.token].add(plan.weight)
    return weight_t.reshape(B, S, 1) * expert(x)

  check_close(y, through(layer, x, context(), apply), 1e-5)


def test_a_plan_keeps_its_own_contract(row):
  """Indices in range, dropped rows weigh nothing, chunks of rows stay in their chunk of tokens."""
  layer, x = make_layer(row), tokens()
  plan = layer.router(x, context())
  if isinstance(plan, SoftPlan):
    assert layer.router.rows_per_token(S) == plan.dispatch[0, 0].size / (plan.across or S)
    if plan.across:
      groups = plan.dispatch.reshape(-1, plan.across, *plan.dispatch.shape[1:])
      np.testing.assert_allclose(groups.sum(1), 1, rtol=1e-5)
      return
    np.testing.assert_allclose(plan.dispatch.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(plan.combine.sum((2, 3)), 1, rtol=1e-5)
    return
  assert isinstance(plan, Assignment)
  assert plan.token.dtype == plan.expert.dtype == plan.chosen.dtype == jnp.int32
  token, expert, chosen = (np.asarray(a) for a in (plan.token, plan.expert, plan.chosen))
  assert ((token >= 0) & (token < B * S)).all()
  dropped = plan.num_experts  # E, and experts without parameters where a router has them
  assert ((expert >= 0) & (expert <= dropped)).all()
  assert (np.asarray(plan.weight)[expert == dropped] == 0).all()
  assert ((expert == chosen) | (expert == dropped)).all()
  rows, chunk = token.size // plan.groups, B * S // plan.groups
  np.testing.assert_array_equal(token // chunk, np.arange(token.size) // rows)
  assert not layer.router.flags.stays_in_sequence or plan.groups % B == 0
  # what is declared for counts of FLOPs: the rows there are at most; where experts choose, their number is rounded down
  rounding = 0 if plan.groups == B * S else E / S
  assert 0 < layer.router.rows_per_token(S) <= token.size / (B * S) + rounding
  kept = (token * dropped + expert)[expert < dropped]
  assert len(set(kept.tolist())) == len(kept)  # no token twice at one expert


def test_narrow_activations_do_not_narrow_the_router(row):
  """bfloat16 inputs choose what the same numbers in float32 choose; weights and losses stay float32."""
  layer, x = make_layer(row, dtype=jnp.bfloat16), tokens().astype(jnp.bfloat16)
  narrow, wide = layer.router(x, context()), layer.router(x.astype(jnp.float32), context())
  jax.tree.map(np.testing.assert_array_equal, narrow, wide)
  y, losses, stats, _ = program(row, gradient=False, dtype=jnp.bfloat16)(layer, x, context())
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves((losses, stats))} == {jnp.dtype(jnp.float32)}
  want = program(row)(make_layer(row), x.astype(jnp.float32), context())[0]
  check_close(y.astype(jnp.float32), want, 0.05)


@pytest.mark.parametrize('row', ['top_k', 'token_major_sequence', 'expert_choice', 'soft', 'dense'])
def test_statistics_add_up(row):
  """The stats of two calls on halves that do not interact are the stats of the joined call."""
  layer, x = make_layer(row), tokens()
  call = program(row, gradient=False)
  halves = [call(layer, x[i : i + 1], context(token_ids=ids()[i : i + 1]))[2] for i in range(B)]
  check_close(jax.tree.map(jnp.add, *halves), program(row)(layer, x, context())[2], 1e-5)


def test_dropless_token_choice_is_permutation_equivariant():
  x, order = tokens(), jax.random.permutation(jax.random.key(0), S)
  check_close(
    outputs('top_k', x[:, order], context()), outputs('top_k', x, context())[:, order], 1e-6
  )


def test_ties_go_to_the_lowest_index():
  layer = make_layer('top_k')
  plan = layer.router.assign(
    dataclasses.replace(layer.router.scores(tokens(), Context()), select=jnp.zeros((B, S, E))),
    Context(),
  )
  np.testing.assert_array_equal(plan.chosen.reshape(B, S, 2), np.broadcast_to([0, 1], (B, S, 2)))
