"""Mixtures across sequences: who mixes with whom, and with which weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, make_router

B, S, D, E = 4, 3, 8, 2
X = jax.random.normal(jax.random.key(1), (B, S, D))


def make_layer(**options):
  return MoE(D, 4, E, {'name': 'mixture_of_tokens', **options}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('emit', ['same', 'softmax'])
def test_a_mixture_is_of_one_position_of_two_sequences(emit):
  """Written out with loops over positions, pairs of sequences, experts and mixtures."""
  layer = make_layer(group_size=2, slots=2, temperature=0.5, emit=emit)
  logits = np.einsum('bsd,dep->bsep', X, layer.router.scorer.kernel[...]) / 0.5
  over_all = np.exp(logits) / np.exp(logits).sum((2, 3), keepdims=True)
  want = np.zeros((B, S, D), np.float32)
  for s in range(S):
    for first in (0, 2):
      pair = [first, first + 1]
      for e in range(E):
        for p in range(2):
          share = np.exp(logits[pair, s, e, p])
          share /= share.sum()
          y = np.asarray(layer.experts.expert(e)(jnp.asarray(share @ X[np.array(pair), s])))
          back = share if emit == 'same' else over_all[pair, s, e, p]
          want[pair, s] += back[:, None] * y
  np.testing.assert_allclose(layer(X, Context(train=True))[0], want, atol=1e-5)


def test_a_group_of_one_is_the_sum_of_all_experts():
  layer = make_layer(group_size=2, eval_group_size=1)
  want = sum(layer.experts.expert(e)(X) for e in range(E))
  np.testing.assert_allclose(layer(X)[0], want, atol=1e-5)
  assert float(jnp.abs(layer(X, Context(train=True))[0] - want).max()) > 1e-2


def test_padding_in_a_group_leaves_the_others_to_mix():
  """Position 2 is padding in the first of a pair of sequences, and in both of the second pair."""
  mask = jnp.ones((B, S), bool).at[0, 2].set(False).at[2:, 2].set(False)
  layer = make_layer(group_size=2)
  y, aux = layer(X, Context(mask=mask, train=True))
  alone = sum(layer.experts.expert(e)(X[1, 2]) for e in range(E))
  np.testing.assert_allclose(y[1, 2], alone, atol=1e-5)
  assert float(jnp.abs(jnp.where(mask[..., None], 0, y)).max()) == 0
  gradient = jax.grad(lambda x: (layer(x, Context(mask=mask))[0] ** 2).sum())(X)
  assert jnp.isfinite(gradient).all()
  assert float(aux.stats.tokens) == 9


def test_members_of_a_group_are_alike():
  layer = make_layer(group_size=2)
  swapped = layer(X[jnp.array([1, 0, 2, 3])], Context(train=True))[0]
  np.testing.assert_allclose(
    swapped[jnp.array([1, 0, 2, 3])], layer(X, Context(train=True))[0], atol=1e-6
  )


def test_bad_options_and_batches_are_refused():
  with pytest.raises(ValueError, match='group_size=3 does not divide the 4 sequences'):
    make_layer(group_size=3)(X)
  for options, message in (
    ({'group_size': 0}, 'group_size=0: accepted are integers from 1'),
    ({'slots': 0}, 'slots=0: accepted are integers from 1'),
    ({'temperature': -1.0}, 'temperature=-1.0: accepted are positive numbers'),
    ({'emit': 'other'}, "emit='other': accepted are 'same', 'softmax'"),
  ):
    with pytest.raises(ValueError, match=message):
      make_router('mixture_of_tokens', d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
