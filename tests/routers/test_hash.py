"""Hash layers: the same id goes to the same expert always, and no expert is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, make_router
from moejax.moe.multi_head import repeat_positions
from moejax.routers.hash import balanced_table
from moejax.routers.router import previous_ids

E, V = 4, 512
X = jnp.zeros((3, V, 2))
IDS = jax.random.permutation(jax.random.key(0), jnp.tile(jnp.arange(V, dtype=jnp.int32), 3))
IDS = IDS.reshape(3, V)


def experts(seed=0, token_ids=IDS, **options):
  fields = {key: options.pop(key) for key in ('positions', 'train') if key in options}
  router = make_router('hash', d_model=2, num_experts=E, rngs=nnx.Rngs(seed), **options)
  plan = router(X, Context(token_ids=token_ids, **fields))
  np.testing.assert_array_equal(plan.weight, 1)
  return np.asarray(plan.expert).reshape(token_ids.shape)


def test_an_id_has_one_expert_in_training_and_evaluation():
  got = experts()
  for token_id in range(0, V, 37):
    assert len(set(got[np.asarray(IDS) == token_id].tolist())) == 1
  np.testing.assert_array_equal(got, experts(train=True))


def test_a_random_hash_spreads_ids_and_differs_between_layers():
  """512 ids over 4 experts: 128 each, give or take three standard deviations of the binomial (9.8)."""
  table = np.zeros(V, int)
  table[np.asarray(IDS).ravel()] = experts().ravel()
  assert np.abs(np.bincount(table, minlength=E) - 128).max() < 30
  other = np.zeros(V, int)
  other[np.asarray(IDS).ravel()] = experts(seed=1).ravel()
  assert np.mean(table == other) == pytest.approx(1 / E, abs=0.06)


def test_a_balanced_hash_gives_experts_equal_counts():
  """Zipf's law: the first id alone is as frequent as the next expert's whole share may be."""
  counts = [1_000_000 // (rank + 1) for rank in range(V)]
  table = balanced_table(counts, E)
  load = np.bincount(table, weights=counts)
  assert load.max() / load.mean() < 1.001
  assert table[:4].tolist() == [0, 1, 2, 3]  # the most frequent ids, apart
  np.testing.assert_array_equal(experts(counts=tuple(counts)), table[np.asarray(IDS)])


def test_previous_and_bigram_hashes_read_the_token_before_in_the_document():
  ids = IDS[:, :6]
  ids = jnp.concatenate([ids, jnp.zeros((3, V - 6), jnp.int32)], 1)
  changed = ids.at[:, 2].add(1)
  previous = experts(of='previous', token_ids=ids) != experts(of='previous', token_ids=changed)
  assert not np.delete(previous, 3, axis=1).any()
  bigram = experts(of='bigram', token_ids=ids) != experts(of='bigram', token_ids=changed)
  assert not np.delete(bigram, [2, 3], axis=1).any()
  assert bigram[:, 2:4].any()
  # a document that begins at position 3 does not see what stands before it
  positions = jnp.broadcast_to(
    jnp.where(jnp.arange(V) < 3, jnp.arange(V), jnp.arange(V) - 3), ids.shape
  )
  before = experts(of='bigram', token_ids=ids, positions=positions)
  after = experts(of='bigram', token_ids=changed, positions=positions)
  np.testing.assert_array_equal(np.delete(before, 2, axis=1), np.delete(after, 2, axis=1))


def test_missing_ids_and_bad_options_are_refused():
  router = make_router('hash', d_model=2, num_experts=E, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r'hash needs token ids: pass context\.token_ids'):
    router(X)
  with pytest.raises(ValueError, match="of='next': accepted are 'token', 'previous', 'bigram'"):
    experts(of='next')
  with pytest.raises(ValueError, match="of='bigram' with counts of 2 ids"):
    experts(of='bigram', counts=(1, 2))


@pytest.mark.parametrize('of', ['previous', 'bigram'])
def test_tokens_taken_out_of_their_sequence_keep_the_token_before_in_it(of):
  """What a block sees that tokens skip, and what sub-tokens see."""
  ids, places = IDS[:, :8], jnp.tile(jnp.array([0, 1, 2, 0, 1, 2, 3, 4], jnp.int32), (3, 1))
  router = make_router('hash', d_model=2, num_experts=E, rngs=nnx.Rngs(0), of=of)
  route = lambda context: np.asarray(router(X[:, : context.token_ids.shape[1]], context).expert)
  whole = Context(token_ids=ids, positions=places)
  want = route(whole).reshape(3, 8)
  chosen = np.array([1, 3, 4, 7])
  part = {name: getattr(whole, name)[:, chosen] for name in ('token_ids', 'positions')}
  part['previous_ids'] = previous_ids(whole)[:, chosen]
  np.testing.assert_array_equal(route(Context(**part)).reshape(3, 4), want[:, chosen])
  without = Context(token_ids=part['token_ids'], positions=part['positions'])
  assert (route(without).reshape(3, 4) != want[:, chosen]).any()  # the control
  twice = route(repeat_positions(whole, 2)).reshape(3, 8, 2)
  np.testing.assert_array_equal(twice, np.stack([want, want], -1))
