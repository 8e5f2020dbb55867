"""Routing classification: labels by hand, the gradient by loops, damped errors, and places that find their expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, make_router
from moejax.routers.classified import labels, wrong

B, S, D, E = 2, 6, 4, 3


def layer(quantile=0.7, damping=0.0, k=1, losses=None):
  router = {'name': 'spatial', 'k': k, 'positions': S, 'weighting': 'unweighted'}
  router |= {'quantile': quantile, 'damping': damping}
  losses = {'guidance': 0.5} if losses is None else losses
  return MoE(D, 5, E, router, losses=losses, rngs=nnx.Rngs(0))


def x_and_target():
  shape = (B, S, D)
  return jax.random.normal(jax.random.key(1), shape), jax.random.normal(jax.random.key(2), shape)


def gradients(layer, context=None):
  graph, state = nnx.split(layer)
  x, target = x_and_target()

  def loss(state, x):
    y, aux = nnx.merge(graph, state)(x, context)
    return ((y - target) ** 2).sum() + sum(aux.losses.values())

  return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)


def test_labels_sum_to_the_number_of_chosen_experts():
  chosen = jnp.array([[[1.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0, 0.0]]])
  got = labels(chosen, jnp.array([[False, True]]))
  np.testing.assert_array_equal(got[0, 0], chosen[0, 0])
  np.testing.assert_allclose(got[0, 1], [2 / 3, 2 / 3, 0, 0, 2 / 3], rtol=1e-6)


def test_the_largest_errors_of_real_tokens_are_wrong():
  size = jnp.array([[1.0, 5.0, 2.0, 9.0, 3.0, 4.0]])
  real = jnp.array([[True, True, True, False, True, True]])
  got = wrong(size[..., None], real, 0.5)  # of 1 2 3 4 5, above 3
  np.testing.assert_array_equal(got, [[False, True, False, False, False, True]])


def by_loops(layer, quantile, coefficient):
  """Gradient of the table, float64: errors, quantile, labels, cross-entropy, one after the other."""
  x, target = (np.asarray(a, np.float64) for a in x_and_target())
  table = np.asarray(layer.router.scorer.kernel[...], np.float64)
  expert = table.argmax(1)
  y = np.stack(
    [
      np.asarray(layer.experts.expert(int(e))(jnp.asarray(x[:, s], jnp.float32)))
      for s, e in enumerate(expert)
    ],
    1,
  )
  error = np.linalg.norm(2 * (y - target), axis=-1)
  limit = np.sort(error.ravel())[int(quantile * (error.size - 1))]
  gradient = np.zeros_like(table)
  for b in range(B):
    for s in range(S):
      for e in range(E):
        if error[b, s] > limit:
          label = 0.0 if e == expert[s] else 1 / (E - 1)
        else:
          label = float(e == expert[s])
        gradient[s, e] += (1 / (1 + np.exp(-table[s, e])) - label) / E
  return coefficient * gradient / (B * S)


def test_the_table_learns_by_the_cross_entropy_with_the_labels():
  made = layer()
  _, (state, _) = gradients(made)
  np.testing.assert_allclose(state.router.scorer.kernel[...], by_loops(made, 0.7, 0.5), atol=1e-6)


def test_errors_of_wrong_experts_are_damped_and_the_others_unchanged():
  plain = gradients(layer(None, losses={}))
  whole = gradients(layer(damping=1.0, losses={}))
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(whole), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  value, (_, by_x) = gradients(layer(damping=0.0, losses={}))
  assert float(value) == pytest.approx(float(plain[0]), rel=1e-6)
  zero = np.abs(np.asarray(by_x)).max(-1) == 0
  assert zero.sum() == 4  # 12 tokens, above the eighth
  np.testing.assert_allclose(by_x[~zero], plain[1][1][~zero], atol=1e-6)


def test_padding_is_never_wrong_and_teaches_nothing():
  mask = jnp.array([[True] * S, [True] * 2 + [False] * 4])
  _, (state, by_x) = gradients(layer(), Context(mask=mask))
  assert bool(jnp.isfinite(state.router.scorer.kernel[...]).all())
  assert float(jnp.abs(by_x[1, 2:]).max()) == 0


def test_places_find_the_expert_that_makes_no_error():
  """Two kinds of places, experts that already are the two maps: the table alone is trained, by its own loss."""
  router = make_router(
    'spatial',
    d_model=D,
    num_experts=2,
    k=1,
    positions=S,
    weighting='unweighted',
    quantile=0.5,
    rngs=nnx.Rngs(0),
  )
  kind = np.array([0, 1, 0, 1, 1, 0])
  x = jax.random.normal(jax.random.key(1), (16, S, D))
  maps = jnp.array([1.0, -1.0])
  target = maps[kind][None, :, None] * x
  graph, state = nnx.split(router)

  def loss(state):
    made = nnx.merge(graph, state)
    context = Context()
    scores, plan = made.route(x, context)
    y = (maps[plan.expert] * plan.weight).reshape(16, S, 1) * x
    y, scores = made.feedback(y, scores, plan, context)
    return ((y - target) ** 2).mean() + scores.guidance.mean()

  step = jax.jit(lambda s: jax.tree.map(lambda p, g: p - 2.0 * g, s, jax.grad(loss)(s)))
  before = float(loss(state))
  for _ in range(100):
    state = step(state)
  assert before > 0.5
  np.testing.assert_array_equal(np.asarray(state.scorer.kernel[...]).argmax(1), kind)


def test_options_out_of_range_are_refused():
  with pytest.raises(ValueError, match='quantile=1.5: accepted are numbers from 0 to 1'):
    layer(quantile=1.5)
