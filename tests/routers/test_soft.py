"""The mixings of Soft MoE: what is uniform, what is learnt, and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, oracle

D, E, P, S = 8, 3, 2, 6
X = jax.random.normal(jax.random.key(1), (2, S, D))
MASK = jnp.array([[True] * S, [True] * 4 + [False] * 2])


def make_layer(mixing, slots=P):
  return MoE(D, 4, E, {'name': 'soft', 'slots': slots, 'mixing': mixing}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('mixing', ['learned', 'learned_dispatch', 'learned_combine', 'uniform'])
def test_what_is_not_learnt_is_uniform_over_real_tokens_and_slots(mixing):
  plan = make_layer(mixing).router(X, Context(mask=MASK))
  real = np.array([6, 4]).reshape(2, 1, 1, 1)
  want = np.where(MASK[..., None, None], 1 / real, 0) * np.ones((1, 1, E, P))
  same = np.allclose(plan.dispatch, want, atol=1e-6)
  assert same == (mixing in ('learned_combine', 'uniform'))
  same = np.allclose(plan.combine[MASK], 1 / (E * P), atol=1e-6)
  assert same == (mixing in ('learned_dispatch', 'uniform'))
  np.testing.assert_allclose(plan.dispatch.sum(1), 1, rtol=1e-5)
  np.testing.assert_allclose(plan.combine.sum((2, 3)), np.where(MASK, 1, 0), rtol=1e-5)


def test_learned_halves_are_those_of_the_whole():
  whole, dispatch, combine = (
    make_layer(mixing).router(X) for mixing in ('learned', 'learned_dispatch', 'learned_combine')
  )
  np.testing.assert_array_equal(whole.dispatch, dispatch.dispatch)
  np.testing.assert_array_equal(whole.combine, combine.combine)


def test_uniform_mixing_gives_all_tokens_of_a_sequence_the_same():
  layer = make_layer('uniform')
  y, _ = layer(X)
  mean = X.mean(1)
  want = sum(layer.experts.expert(e)(mean) for e in range(E)) / E
  np.testing.assert_allclose(y, np.broadcast_to(want[:, None], y.shape), atol=1e-6)


def test_identity_sends_token_i_through_slot_i_alone():
  """Six tokens, three experts of two slots: token i is of expert i // 2; later tokens and padding are not seen."""
  layer = make_layer('identity')
  assert layer.router.flags.prefix_safe
  assert layer.router.rows_per_token(S) == 1
  y, aux = layer(X, Context(mask=MASK))
  for i in range(S):
    want = layer.experts.expert(i // P)(X[:, i])
    np.testing.assert_allclose(y[:, i], np.where(MASK[:, i, None], want, 0), atol=1e-6)
  plan = layer.router(X, Context(mask=MASK))
  np.testing.assert_allclose(y, oracle.moe(X, plan, layer.experts), atol=1e-6)
  np.testing.assert_array_equal(aux.stats.kept_e, [4, 4, 2])


@pytest.mark.parametrize('mixing', ['uniform', 'identity'])
def test_fixed_mixings_have_no_parameters(mixing):
  router = make_layer(mixing).router
  assert not router.flags.trains_router
  assert not jax.tree.leaves(nnx.split(router)[1])


def test_identity_with_other_numbers_of_slots_is_refused():
  layer = make_layer('identity', slots=1)
  message = "mixing='identity' with num_experts=3 of slots=1 on 6 tokens .* num_experts . slots = 6"
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda x: layer(x)[0], X)
  with pytest.raises(ValueError, match="mixing='learnt': accepted are 'learned', "):
    make_layer('learnt')
