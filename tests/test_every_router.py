"""One table of routers, one list of properties: every row has every property, in value and gradient."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import Assignment, SoftPlan, oracle
from moejax.moe.dispatch import DISPATCHES, fused
from moejax.moe.zero_computation import rows_of_bank
from moejax.routers import ROUTERS
from moejax.routers.weighting import WEIGHTINGS
from tests.router_table import (
  ONE_OF_EACH,
  ROWS,
  SCORERS,
  USUAL,
  B,
  D,
  E,
  S,
  by_layer,
  by_oracle,
  check_close,
  context,
  drawn_layer,
  draws,
  ids,
  make_layer,
  outputs,
  plan_of,
  program,
  promise_program,
  promised_outputs,
  rotated,
  route,
  rows_program,
  through,
  tokens,
  unchanged_layer,
  widen,
)
from tests.thorough import unless


def rows(names, usual=USUAL):
  """Parameters; those of further options are among the thorough tests."""
  return [pytest.param(name, marks=unless(name in usual)) for name in names]


of_own_decisions = pytest.mark.parametrize(
  'row', rows(ROWS, set(USUAL) - set(SCORERS)), indirect=True, scope='module'
)
"""As `row`, with the routers that only have other logits among the thorough tests too."""


@pytest.fixture(params=rows(ROWS), scope='module')
def row(request):
  """A row of the table. All its properties are tested before the next row's.

  Then its programs are let go; those of single operations, which all rows share, only before their memory maps reach
  Linux's limit of 65,530 a process.
  """
  yield request.param
  for of_the_row in (
    program,
    promise_program,
    promised_outputs,
    plan_of,
    unchanged_layer,
    drawn_layer,
  ):
    of_the_row.cache_clear()
  maps = pathlib.Path('/proc/self/maps')
  if not maps.exists() or maps.read_bytes().count(b'\n') > 10_000:
    jax.clear_caches()


def test_the_table_has_every_router_and_weighting():
  assert {row['name'] for row in ROWS.values()} == set(ROUTERS) == set(moejax.router_names())
  assert {ROWS[row]['name'] for row in USUAL} == set(ROUTERS)
  assert {row.get('weighting') for row in ROWS.values()} >= set(WEIGHTINGS)


def test_value_and_gradient_are_the_oracles_in_float32(row):
  layer, x = make_layer(row), tokens()
  y, _, _, gradients = program(row)(layer, x, context())
  want, _, _, want_gradients = program(row, by_oracle)(layer, x, context())
  check_close((y, gradients), (want, want_gradients), 1e-5)
  # the check can fail: with experts moved by one the output is far off; of a mean of all experts with half of each
  moved = rotated(layer, ('w_down',) if row == 'soft_uniform' else None)
  far = jnp.abs(program(row)(moved, x, context())[0] - want).max()
  assert far > 10 * jnp.abs(y - want).max()
  assert far > 1e-2 * jnp.abs(want).max()


@of_own_decisions
@pytest.mark.usefixtures('x64')
def test_value_and_gradient_are_the_oracles_in_float64(row):
  """A step that is computed in float32 shows here. No mask: that is not the program of the other tests."""
  layer, x = widen(make_layer(row)), tokens(dtype=jnp.float64)
  y, _, _, gradients = program(row, dtype=jnp.float64)(layer, x, context(mask=None))
  assert y.dtype == jnp.float64
  oracles = program(row, by_oracle, dtype=jnp.float64)
  want, _, _, want_gradients = oracles(layer, x, context(mask=None))
  check_close((y, gradients), (want, want_gradients), 1e-10)


SLOTS = (*(row for row in ROWS if ROWS[row]['name'] == 'soft'), 'mixture_of_tokens')
"""Rows whose slots no dispatch sees."""


@pytest.mark.parametrize('row', rows(row for row in ROWS if row not in SLOTS))
def test_every_dispatch_is_the_fused_one(row):
  """In value and gradient, by all that a dispatch sees of the router, which is its rows."""
  layer, x = unchanged_layer(row), tokens().reshape(-1, D)
  rows = rows_of_bank(plan_of(row), E)
  want = rows_program(fused)(layer.experts, x, rows)
  for name in set(DISPATCHES) - {'fused'}:
    check_close(rows_program(DISPATCHES[name])(layer.experts, x, rows), want, 1e-5)
  moved = dataclasses.replace(rows, expert=jnp.where(rows.expert < E, (rows.expert + 1) % E, E))
  with pytest.raises(AssertionError):
    check_close(rows_program(fused)(layer.experts, x, moved), want, 1e-2)


@pytest.mark.parametrize('row', ['top_k', 'token_major', 'expert_choice', 'ada_moe', 'soft'])
@pytest.mark.parametrize('dispatch', sorted(set(DISPATCHES) - {'fused'}))
def test_a_layer_with_any_dispatch_is_the_one_with_the_fused(row, dispatch):
  layer, x = make_layer(row), tokens()
  got = program(row, dispatch=DISPATCHES[dispatch])(layer, x, context())
  check_close(got, program(row)(layer, x, context()), 1e-5)


@of_own_decisions
def test_jit_is_eager(row):
  layer, x = make_layer(row), tokens()
  check_close(program(row)(layer, x, context())[:3], by_layer(layer, x, context()), 1e-5)


def change(row, what, life, where) -> float:
  """Largest change of these outputs when `what` of tokens and ids is rewritten; over 20 draws."""
  before, after = (promised_outputs(row)[key][life][where] for key in ('nothing', what))
  return float(np.abs(before - after).max())


@pytest.mark.parametrize('life', ['train', 'eval'])
def test_later_tokens_change_earlier_outputs_only_where_the_flag_says_so(row, life):
  flags = unchanged_layer(row).router.flags
  safe = flags.prefix_safe_train if life == 'train' else flags.prefix_safe_eval
  worst = change(row, 'later', life, np.s_[:, 1, :4])
  assert (worst < 1e-6) if safe else (worst > 1e-3)


def test_other_sequences_change_outputs_only_where_the_flag_says_so(row):
  """The flag promises both for training and for evaluation; some routers break it in training only."""
  worst = max(change(row, 'others', life, np.s_[:, 2]) for life in ('train', 'eval'))
  assert (worst < 1e-6) if unchanged_layer(row).router.flags.batch_free else (worst > 1e-3)


def test_evaluation_needs_no_key_and_ignores_it(row):
  """Where the flag says otherwise, a key is not needed either, but two keys give two outputs."""
  found = promised_outputs(row)['nothing']
  keyless, keyed = found['without a key'], found['eval']
  if unchanged_layer(row).router.flags.deterministic_eval:
    np.testing.assert_array_equal(keyless, keyed)
  else:
    assert np.abs(keyless - keyed).max() > 1e-3
    again = promise_program(row)(*draws()['nothing'])
    np.testing.assert_array_equal(keyless, again['without a key'])


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
  mask = jnp.array([[True] * S, [True] * 3 + [False] * (S - 3)])
  clean = jnp.where(mask[..., None], tokens(), 0)
  dirty = jnp.where(mask[..., None], clean, jnp.nan)
  want = program(row)(layer, clean, context(mask=mask))
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
  got = program(row)(layer, dirty, context(mask=mask))
  check_close(got, want, 1e-6)
  y, _, stats, gradients = got
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert float(jnp.abs(gradients[1][1, 3:]).max()) == 0
  assert float(stats.tokens) == S + 3
  assert float(stats.prob_e.sum()) == pytest.approx(S + 3, rel=1e-5)


@pytest.mark.parametrize('row', [row for row in ONE_OF_EACH if row not in SCORERS])
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
  router = nnx.split(layer.router)
  one_pass = combine_weights(route(*router, x, context_of_all)[1])
  one_by_one = combine_weights(route(*router, x.reshape(-1, 1, D), apart)[1])
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
  layer, plan = unchanged_layer(row), plan_of(row)
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


@of_own_decisions
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


UNTIED = {
  'soft': 'chooses nothing',
  'mixture_of_tokens': 'chooses nothing',
  'hash': 'chooses by token ids',
  'thor': 'draws experts',
  'ewa': 'draws experts',
  'sparse_expert_choice': 'its prices keep experts from tokens that others have taken',
}
"""Routers without a choice between equal scores."""

UNTIED_IN_TRAINING = {
  'base': 'fills every expert',
  'dense_to_sparse': 'has noise of its own beside the scores',
  'moec': 'drops experts at random',
}

EXPERTS_CHOOSE = ('expert_choice', 'sinkhorn_expert_choice')


class Equal(nnx.Module):
  """A scorer to which all is alike: logits 0, or -inf where they are, without noise."""

  def __init__(self, scorer):
    self.scorer = scorer

  def __call__(self, x, context):
    logits, _, *state = self.scorer(x, context)
    return jnp.where(jnp.isneginf(logits), logits, 0), None, *state

  def initial_state(self, *shape):
    return self.scorer.initial_state(*shape)


def check_first(index, among=None):
  """These are the first of `among`, all numbers where not given."""
  index = np.sort(index)
  np.testing.assert_array_equal(
    index, (np.arange(index.size) if among is None else among)[: index.size]
  )


@pytest.mark.parametrize('life', ['train', 'eval'])
def test_of_equal_scores_the_lowest_index_is_chosen(row, life):
  """Tokens take the first experts, experts the first tokens of those that compete for them."""
  name, options = ROWS[row]['name'], ROWS[row]
  if name in UNTIED or (life == 'train' and name in UNTIED_IN_TRAINING):
    return
  router = make_layer(row).router
  router.scorer, router.bias = Equal(router.scorer), None
  scores, plan = router.route(tokens(), context(train=life == 'train'))
  token, chosen = np.asarray(plan.token), np.asarray(plan.chosen)
  sequence, position, wanted = token // S, token % S, chosen < plan.num_experts
  if name in EXPERTS_CHOOSE:
    group = options.get('group', 'sequence')
    of, place = {
      'sequence': (sequence, position),
      'batch': (0 * token, token),
      'position': (position, sequence),
    }[group]
    for one in set(of):
      for e in range(E):
        chose = wanted & (of == one) & (chosen == e)
        assert chose.any()
        check_first(place[chose])
    return
  sees_te = np.ones((B * S, plan.num_experts), bool)
  if name == 'mask_moe':
    sees_te = ~np.isneginf(scores.logits).reshape(B * S, E)
  for t in range(B * S):
    own = chosen[wanted & (token == t)]
    assert own.size or name in ('ds_moe', 'space_moe')  # below a threshold, on no map
    check_first(own, np.flatnonzero(sees_te[t]))


@pytest.mark.parametrize('row', rows(row for row in ROWS if 'capacity_factor' in ROWS[row]))
def test_where_there_is_no_room_for_all_of_equal_scores_the_first_tokens_have_it(row):
  name, options = ROWS[row]['name'], ROWS[row]
  if name in (*UNTIED, *EXPERTS_CHOOSE) or options.get('priority') == 'random':
    return
  router = make_layer(row).router
  router.scorer, router.bias = Equal(router.scorer), None
  plan = router(tokens(), context(train=True))
  token, expert, chosen = (np.asarray(a) for a in (plan.token, plan.expert, plan.chosen))
  of = token // S if options.get('capacity_group') == 'sequence' else 0 * token
  for one in set(of):
    rows = (of == one) & (chosen == 0)
    kept = (expert == 0)[rows][np.argsort(token[rows], kind='stable')]
    assert 0 < kept.sum() < kept.size
    check_first(np.flatnonzero(kept))


def test_exemptions_from_the_rule_of_ties_are_of_routers_that_there_are():
  assert set(UNTIED) | set(UNTIED_IN_TRAINING) | set(EXPERTS_CHOOSE) <= set(ROUTERS)
