"""Plans of few non-zeros, and the router that takes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx

from moejax import Context, make_router
from moejax.routers.sparse_expert_choice import among_largest, onto_simplex, sparse_plan

T, E, D = 12, 3, 8
SIMILARITY = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (1, T, E)), -1)
X = jax.random.normal(jax.random.key(1), (2, T, D))
plan_of = jax.jit(sparse_plan, static_argnums=(1,), static_argnames=('iterations', 'learning_rate'))


def test_the_simplex_by_hand():
  """(0.9, 0.5, -0.2) to a sum of 1: 0.2 off the first two; to a sum of 0.3, or of one entry, the first is left."""
  x = jnp.array([[0.5], [-0.2], [0.9]])
  onto = lambda total, limit: onto_simplex(x, jnp.array(total), limit)[:, 0]
  np.testing.assert_allclose(onto(1.0, 3), [0.3, 0, 0.7], atol=1e-6)
  np.testing.assert_allclose(onto(1.0, 2), [0.3, 0, 0.7], atol=1e-6)
  np.testing.assert_allclose(onto(1.0, 1), [0, 0, 1.0], atol=1e-6)
  np.testing.assert_allclose(onto(0.3, 3), [0, 0, 0.3], atol=1e-6)
  np.testing.assert_allclose(onto(0.0, 3), 0, atol=1e-6)


@pytest.mark.parametrize('limit', [1, 5, 33, 200])
def test_the_simplex_is_that_of_the_sorted_entries(limit):
  """Duchi et al. 2008: the shift is the last of `(sum of the r largest - total) / r` that is below the r-th."""
  x = np.random.default_rng(limit).normal(size=(200, 7)).astype(np.float32)
  got = onto_simplex(jnp.asarray(x), jnp.array(3.0), limit)
  for column, found in zip(x.T, np.asarray(got).T, strict=True):
    falling = np.sort(column)[::-1][:limit].astype(np.float64)
    shifts = (np.cumsum(falling) - 3) / np.arange(1, limit + 1)
    shift = shifts[np.flatnonzero(falling > shifts)[-1]]
    want = np.where(column >= falling[-1], np.maximum(column - shift, 0), 0)
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize('limit', [1, 4, 11, 12])
def test_the_largest_are_those_of_top_k(limit):
  """Of equal entries the first, whatever the sign of a zero."""
  x = jnp.round(jax.random.normal(jax.random.key(limit), (T, 50)))
  among = jax.jit(among_largest, static_argnums=1)(x, limit)
  _, place = jax.lax.top_k((x + 0).T, limit)
  want = np.zeros((50, T), bool)
  np.put_along_axis(want, np.asarray(place), True, 1)
  np.testing.assert_array_equal(among.T, want)


def test_columns_sum_to_their_share_and_have_few_non_zeros():
  for limit in (2, 4, 7):
    plan = plan_of(SIMILARITY, limit)[0]
    assert float(plan.min()) == 0
    np.testing.assert_allclose(plan.sum(0), T / E, rtol=1e-5)
    assert int((plan > 0).sum(0).max()) <= limit


def test_without_a_bound_it_is_the_quadratic_transport_plan():
  """The same programme without a limit is convex: SciPy solves it on all entries at once."""
  similarity = np.asarray(SIMILARITY[0], np.float64)
  rows = [
    {
      'type': 'eq',
      'fun': lambda p, t=t: p.reshape(T, E)[t].sum() - 1,
      'jac': lambda p, t=t: mark(t),
    }
    for t in range(T)
  ]
  columns = [
    {'type': 'eq', 'fun': lambda p, e=e: p.reshape(T, E)[:, e].sum() - T / E}
    for e in range(E - 1)  # the last follows
  ]

  def mark(t):
    return (np.arange(T * E) // E == t).astype(float)

  found = scipy.optimize.minimize(
    lambda p: 0.5 * (p * p).sum() - (p * similarity.reshape(-1)).sum(),
    np.full(T * E, 1 / E),
    jac=lambda p: p - similarity.reshape(-1),
    bounds=[(0, None)] * (T * E),
    constraints=rows + columns,
    method='SLSQP',
    options={'ftol': 1e-12, 'maxiter': 500},
  )
  assert found.success
  plan = plan_of(SIMILARITY, T, iterations=3000, learning_rate=1e-3)[0]
  np.testing.assert_allclose(plan, found.x.reshape(T, E), atol=2e-3)


def test_prices_leave_fewer_tokens_out():
  """All experts like the same tokens most: gates alone send them all there."""
  logits = jnp.linspace(2, 0, T)[None, :, None] * jnp.array([1.0, 0.9, 0])[None, None]
  gates = jax.nn.softmax(logits, -1)[..., :2]
  left_out = lambda iterations: int(
    (plan_of(gates, T // 2, iterations=iterations).sum(2) == 0).sum()
  )
  assert left_out(0) == T // 2
  assert left_out(20) < T // 2


def test_padding_counts_for_nothing():
  real = jnp.arange(T)[None] < 9
  plan = plan_of(jnp.where(real[..., None], SIMILARITY, 50.0), 4, real)
  np.testing.assert_allclose(plan[0, :9], plan_of(SIMILARITY[:, :9], 4)[0], atol=1e-4)
  assert float(jnp.abs(plan[0, 9:]).max()) == 0
  assert float(jnp.abs(plan_of(SIMILARITY, 4, jnp.zeros((1, T), bool))).max()) == 0


def test_experts_take_the_non_zeros_with_the_gates_as_weights():
  """A factor of 3 would let experts take all tokens; what the plan leaves at zero they do not take."""
  router = make_router(
    'sparse_expert_choice',
    d_model=D,
    num_experts=E,
    rngs=nnx.Rngs(0),
    capacity_factor=3.0,
    init_std=3.0,
  )
  scores, rows = router.route(X, Context())
  gates = np.asarray(jax.nn.softmax(scores.logits, -1)).reshape(-1, E)
  taken = np.zeros((2 * T, E))
  inside = np.asarray(rows.expert) < E
  taken[np.asarray(rows.token)[inside], np.asarray(rows.expert)[inside]] = np.asarray(rows.weight)[
    inside
  ]
  plan = np.asarray(plan_of(jax.nn.softmax(scores.logits, -1), T)).reshape(-1, E)
  assert 0 < (plan > 0).sum() < plan.size
  np.testing.assert_allclose(taken, np.where(plan > 0, gates, 0), rtol=1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'iterations': -1}, 'iterations=-1: accepted are integers from 0'),
    ({'learning_rate': 0.0}, 'learning_rate=0.0: accepted are positive numbers'),
    ({'capacity_factor': 0.0}, 'capacity_factor=0.0: accepted are positive numbers'),
    ({'group': 'row'}, "group='row': accepted are 'sequence', 'batch', 'position'"),
    ({'group_size': 2}, "group_size=2 with group='sequence': accepted are None, or integers"),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    make_router('sparse_expert_choice', d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
