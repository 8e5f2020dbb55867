"""Routers that nobody trains: random draws, partitions, frozen kernels and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, make_router
from moejax.routers.mask_moe import frequent_ids
from moejax.routers.smoe_dropout import Ramp

B, S, D, E, V = 3, 8, 4, 4, 32
X = jax.random.normal(jax.random.key(1), (B, S, D))
IDS = jax.random.randint(jax.random.key(2), (B, S), 0, V, jnp.int32)


def make(name, seed=0, **options):
  return make_router(name, d_model=D, num_experts=E, rngs=nnx.Rngs(seed), **options)


def context(train=True, seed=0, **fields):
  return Context(train=train, rng=jax.random.key(seed), **fields)


def test_thor_draws_one_expert_for_the_whole_batch_in_training():
  router = make('thor')
  plans = jax.vmap(lambda seed: router(X, context(seed=seed)))(jnp.arange(64, dtype=jnp.uint32))
  drawn = np.asarray(plans.expert)
  np.testing.assert_array_equal(plans.weight, 1)
  np.testing.assert_array_equal(drawn, np.broadcast_to(drawn[:, :1], drawn.shape))
  assert set(drawn[:, 0].tolist()) == set(range(E))


@pytest.mark.parametrize('level', ['token', 'sequence'])
def test_thor_draws_by_token_or_by_sequence_in_evaluation(level):
  router = make('thor', evaluation=level)
  x = jnp.zeros((16, S, D))
  expert = np.asarray(router(x, context(train=False)).expert).reshape(16, S)
  assert (level == 'sequence') == bool((expert == expert[:, :1]).all())
  assert set(expert.ravel().tolist()) == set(range(E))
  keyless = router(x).expert
  np.testing.assert_array_equal(keyless, router(x).expert)
  assert (keyless != make('thor', seed=1, evaluation=level)(x).expert).any()  # layers differ


@pytest.mark.parametrize(('name', 'options'), [('thor', {'evaluation': 'average'}), ('ewa', {})])
def test_the_average_of_all_experts_in_evaluation(name, options):
  router = make(name, **options)
  plan = router(X)
  np.testing.assert_array_equal(plan.expert.reshape(-1, E), np.tile(np.arange(E), (B * S, 1)))
  np.testing.assert_allclose(plan.weight, 1 / E)
  assert router.flags.deterministic_eval
  assert router(X, context()).expert.size == B * S


def test_ewa_cuts_real_tokens_into_equal_random_parts():
  mask = jnp.arange(S)[None] < jnp.array([8, 5, 0])[:, None]
  plans = [make('ewa')(X, context(seed=seed, mask=mask)) for seed in range(2)]
  for plan in plans:
    assert sorted(np.bincount(plan.expert, minlength=E + 1).tolist()) == [3, 3, 3, 4, 11]
    np.testing.assert_array_equal(plan.expert.reshape(B, S) == E, ~mask)
  assert (plans[0].expert != plans[1].expert).any()


def test_the_ramp_of_smoe_dropout():
  """E = 16 from 8 to 16: half goes to even, and what is not training has its own k."""
  ramp = Ramp(8, 16, 4)
  progress = (0.0, 0.1, 0.5, 0.9, 1.0)
  got = [int(ramp(Context(train=True, progress=jnp.float32(p)))) for p in progress]
  assert got == [8, 9, 12, 15, 16]
  assert int(ramp(Context(train=True))) == 16
  assert int(ramp(Context())) == 4


def test_smoe_dropout_is_top_k_of_a_frozen_kernel():
  router = make('smoe_dropout', k_min=1, k_max=3)
  assert not jax.tree.leaves(nnx.split(router, nnx.Param, ...)[1])
  logits = np.asarray(X @ router.scorer.kernel[...]).reshape(-1, E)
  for progress, k in ((0.0, 1), (0.5, 2), (1.0, 3)):
    plan = router(X, context(progress=jnp.float32(progress)))
    dense = np.zeros((B * S, E + 1))
    np.add.at(dense, (np.asarray(plan.token), np.asarray(plan.expert)), np.asarray(plan.weight))
    inside = logits >= np.sort(logits)[:, -k][:, None]
    want = np.where(inside, np.exp(logits), 0)
    np.testing.assert_allclose(dense[:, :E], want / want.sum(1, keepdims=True), atol=1e-6)
    assert int((plan.expert < E).sum()) == k * B * S
  assert router.rows_per_token(S) == 2


def test_frequent_ids_are_the_fewest_that_make_up_the_mass():
  counts = [5, 40, 10, 25, 20]
  assert frequent_ids(counts, 0.8).tolist() == [False, True, False, True, True]
  assert frequent_ids(counts, 0.65).tolist() == [False, True, False, True, False]
  assert frequent_ids(counts, 1.0).all()
  assert not frequent_ids(counts, 0.0).any()


def test_no_token_uses_an_expert_that_its_id_does_not_see():
  counts = np.where(np.arange(V) < 8, 100, 1)
  router = make('mask_moe', k=3, visible=2, counts=tuple(counts.tolist()), frequent_mass=0.9)
  seen = np.asarray(router.scorer.table[...])
  np.testing.assert_array_equal(seen.sum(1), np.where(np.arange(V) < 8, 2, 1))
  for train in (True, False):
    plan = router(X, context(train=train, token_ids=IDS))
    expert = np.asarray(plan.expert).reshape(B * S, 3)
    ids = np.asarray(IDS).ravel()
    for token, chosen in enumerate(expert):
      assert set(chosen[chosen < E].tolist()) == set(np.flatnonzero(seen[ids[token]]).tolist())
    weight = np.asarray(plan.weight).reshape(B * S, 3)
    np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-5)


def test_masks_of_one_and_of_all_experts_are_a_hash_layer_and_plain_top_k():
  hashed = make('mask_moe', visible=1, vocab_size=V)
  plan = hashed(X, context(token_ids=IDS))
  np.testing.assert_array_equal(
    plan.expert, np.asarray(hashed.scorer.table[...]).argmax(1)[IDS].ravel()
  )
  np.testing.assert_allclose(plan.weight, 1)
  full, plain = make('mask_moe', visible=E, vocab_size=V, k=2), make('top_k', k=2)
  nnx.update(plain.scorer, nnx.split(full.scorer.linear)[1])
  jax.tree.map(np.testing.assert_array_equal, full(X, context(token_ids=IDS)), plain(X, context()))


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    (
      'thor',
      {'evaluation': 'mean'},
      "evaluation='mean': accepted are 'token', 'sequence', 'average'",
    ),
    (
      'smoe_dropout',
      {'k_min': 3, 'k_max': 2},
      'k_min=3, k_max=2 with num_experts=4: accepted are 1',
    ),
    ('smoe_dropout', {'eval_k': 5}, 'eval_k=5 with num_experts=4: accepted are 1 to 4'),
    ('mask_moe', {}, 'vocab_size=None with counts of None ids: accepted is one of both'),
    (
      'mask_moe',
      {'vocab_size': V, 'visible': 5},
      'visible=5 with num_experts=4: accepted are 1 to 4',
    ),
    (
      'mask_moe',
      {'vocab_size': V, 'balance_bias': True},
      "option 'balance_bias' of router 'mask_moe'",
    ),
    (
      'mask_moe',
      {'counts': (1, 2), 'frequent_mass': 1.5},
      'frequent_mass=1.5: accepted are numbers',
    ),
  ],
)
def test_bad_options_are_refused(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, **options)


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('thor', {}, r'thor needs context\.rng in training'),
    ('ewa', {}, r'ewa needs context\.rng in training'),
    ('mask_moe', {'vocab_size': V}, r'mask_moe needs token ids: pass context\.token_ids'),
  ],
)
def test_what_the_context_lacks_is_named(name, options, message):
  with pytest.raises(ValueError, match=message):
    make(name, **options)(X, Context(train=True))
