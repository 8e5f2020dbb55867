"""Sinkhorn plans and what routers make of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, make_router
from moejax.routers.sinkhorn import sinkhorn_plan

T, E, D = 32, 4, 8
LOGITS = 2 * jax.random.normal(jax.random.key(0), (1, T, E))
X = jax.random.normal(jax.random.key(1), (2, T, D))
plan_of = jax.jit(sinkhorn_plan, static_argnames=('temperature', 'iterations'))


def test_constants_of_tokens_and_of_experts_change_nothing():
  want = plan_of(LOGITS, iterations=50)
  shifted = LOGITS + 3.0 * jnp.arange(E, dtype=jnp.float32)[None, None]
  np.testing.assert_allclose(plan_of(shifted, iterations=50), want, atol=1e-5)
  shifted = LOGITS + 100.0 * jnp.arange(T, dtype=jnp.float32)[None, :, None]  # exp would overflow
  np.testing.assert_allclose(plan_of(shifted, iterations=50), want, atol=1e-4)


def test_the_plan_is_that_of_the_textbook():
  """Megatron's iteration, on exponentials, by NumPy."""
  cost = np.exp(np.asarray(LOGITS[0], np.float64))
  d1 = np.ones(E)
  for _ in range(200):
    d0 = 1 / T / (cost @ d1)
    d1 = 1 / E / (cost.T @ d0)
  np.testing.assert_allclose(
    plan_of(LOGITS, iterations=200)[0], T * d1 * cost * d0[:, None], atol=1e-5
  )


def test_padding_counts_for_nothing():
  real = jnp.arange(T)[None] < 20
  plan = plan_of(jnp.where(real[..., None], LOGITS, 50.0), real, iterations=50)
  np.testing.assert_allclose(plan[0, :20], plan_of(LOGITS[:, :20], iterations=50)[0], atol=1e-5)
  assert float(jnp.abs(plan[0, 20:]).max()) == 0
  assert jnp.isfinite(plan_of(LOGITS, jnp.zeros((1, T), bool))).all()


def test_a_low_temperature_comes_close_to_a_balanced_assignment():
  def loads(temperature, iterations):
    plan = plan_of(LOGITS, temperature=temperature, iterations=iterations)
    return np.bincount(plan[0].argmax(-1), minlength=E)

  greedy = np.bincount(np.asarray(LOGITS[0]).argmax(-1), minlength=E)
  assert np.ptp(loads(0.05, 500)) <= 2 < np.ptp(greedy)


@pytest.mark.parametrize('k', [1, 2])
def test_token_choice_follows_the_plan_in_training_and_the_logits_in_evaluation(k):
  router = make_router('sinkhorn', d_model=D, num_experts=E, rngs=nnx.Rngs(0), k=k)
  scores = router.scores(X, Context())
  plan = plan_of(scores.logits.reshape(1, -1, E))[0]
  gate = jax.nn.sigmoid(scores.logits) if k == 1 else jax.nn.softmax(scores.logits)
  for train, score in ((True, plan), (False, scores.logits.reshape(-1, E))):
    rows = router(X, Context(train=train))
    want = np.argsort(-np.asarray(score), -1, kind='stable')[:, :k]
    np.testing.assert_array_equal(rows.expert.reshape(-1, k), want)
    weight = np.take_along_axis(np.asarray(gate).reshape(-1, E), want, -1)
    np.testing.assert_allclose(rows.weight.reshape(-1, k), weight, rtol=1e-5)


def test_groups_are_apart_and_expert_choice_takes_whole_columns():
  for name in ('sinkhorn', 'sinkhorn_expert_choice'):
    router = make_router(name, d_model=D, num_experts=E, rngs=nnx.Rngs(0), group='sequence')
    assert router.flags.batch_free
    both, first = (router(x, Context(train=True)) for x in (X, X[:1]))
    np.testing.assert_array_equal(both.expert[: first.expert.size], first.expert)
  rows = router(X, Context(train=True))
  np.testing.assert_array_equal(jnp.bincount(rows.expert, length=E), 2 * T // E)


def test_bad_options_are_refused():
  for options, message in (
    ({'temperature': 0.0}, 'temperature=0.0: accepted are positive numbers'),
    ({'iterations': 0}, 'iterations=0: accepted are integers from 1'),
    ({'group': 'position'}, "group='position': accepted are 'sequence', 'batch'"),
    ({'balance_bias': True}, "option 'balance_bias' of router 'sinkhorn'"),
  ):
    with pytest.raises(ValueError, match=message):
      make_router('sinkhorn', d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
