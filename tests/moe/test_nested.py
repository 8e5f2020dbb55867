"""Nested experts: who takes which token, and that small experts are slices of the large one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context
from moejax.moe.nested import NestedFFN, prefer_largest, shares_for, token_counts

B, S, D, F, E = 2, 6, 8, 16, 3
TABLE = [[2.0, 1.0, 0.0, -1.0], [1.5, 1.4, 0.2, 0.1], [0.3, 2.2, 0.1, -0.5]]
TABLE += [[1.8, -0.2, 0.9, 0.4], [2.5, 0.6, -0.3, 0.0], [0.0, 0.1, 0.2, 0.3]]


def make(**options):
  layer = NestedFFN(D, F, E, **options, rngs=nnx.Rngs(0))
  layer.alpha[...] = jnp.asarray(0.7)
  return layer


def test_large_experts_choose_first():
  """Counts 1, 1, 2, 2 on the golden table of probabilities: experts 1, 2, 2, 3, 0, 3 of tokens 0 to 5."""
  probs = jax.nn.softmax(jnp.asarray([TABLE]), -1)
  assert prefer_largest(probs, (1, 1, 2, 2))[0].tolist() == [1, 2, 2, 3, 0, 3]


@pytest.mark.parametrize(
  ('effective', 'published'),
  [
    (0.25, (0.49, 0.33, 0.15, 0.03)),
    (0.5, (0.23, 0.23, 0.25, 0.29)),
    (0.75, (0.08, 0.11, 0.19, 0.62)),
    (1.0, (0, 0, 0, 1)),
  ],
)
def test_shares_of_the_tokens_have_the_published_values(effective, published):
  shares = shares_for(effective, 4)
  np.testing.assert_allclose(shares, published, atol=0.011)
  assert np.dot(shares, [1 / 8, 1 / 4, 1 / 2, 1]) == pytest.approx(effective, abs=1e-6)
  assert sum(token_counts(shares, 49)) == 49
  with pytest.raises(ValueError, match='effective=0.1: accepted are numbers above 0.125'):
    shares_for(0.1, 4)


def probabilities(layer, x):
  logits = x @ layer.gate_kernel[...] + layer.gate_offset[...][None, None]
  return jax.nn.softmax(logits, -1)


def by_loops(layer, x, chosen):
  """Token by token, with weights cut and the output filled up with zeros."""
  probs = probabilities(layer, x)
  rows = []
  for b in range(B):
    for s in range(S):
      j = int(chosen[b, s])
      width, inner = D // 2 ** (E - 1 - j), F // 2 ** (E - 1 - j)
      h = jax.nn.gelu(x[b, s, :width] @ layer.ffn.up.weight[...][:width, :inner])
      y = h @ layer.ffn.down.weight[...][:inner, :width]
      rows.append(jnp.pad(y, (0, D - width)) * (layer.alpha[...] * probs[b, s, j] + 1))
  return jnp.stack(rows).reshape(B, S, D)


def test_a_small_expert_is_a_slice_of_the_large_one_in_value_and_gradient():
  layer, x = make(), jax.random.normal(jax.random.key(1), (B, S, D))
  graph, state = nnx.split(layer)
  target = jax.random.normal(jax.random.key(2), x.shape)
  loss = lambda state: (nnx.merge(graph, state)(x)[0] * target).sum()
  chosen = np.asarray(prefer_largest(probabilities(layer, x), token_counts(layer.shares, S)))
  want = lambda state: (by_loops(nnx.merge(graph, state), x, chosen) * target).sum()
  value, gradient = jax.jit(jax.value_and_grad(loss))(state)
  by_definition = jax.jit(jax.value_and_grad(want))(state)
  for a, b in zip(jax.tree.leaves((value, gradient)), jax.tree.leaves(by_definition), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  assert float(jnp.abs(gradient.alpha[...])) > 1e-3
  assert float(jnp.abs(gradient.gate_kernel[...]).max()) > 1e-4


def test_the_whole_budget_is_the_plain_network_and_layers_above_do_as_the_first():
  layer, x = make(effective=1.0), jax.random.normal(jax.random.key(1), (B, S, D))
  layer.alpha[...] = jnp.zeros(())
  np.testing.assert_allclose(layer(x)[0], layer.ffn(x), atol=1e-5)
  first, second = make(), make()
  mask = jnp.array([[True] * S, [True] * 4 + [False] * 2])
  y, aux = first(jnp.where(mask[..., None], x, jnp.nan), Context(mask=mask))
  assert bool(jnp.isfinite(y).all())
  assert float(jnp.abs(y[1, 4:]).max()) == 0
  above = second(-x, Context(mask=mask, state=aux.state))[1]
  np.testing.assert_array_equal(above.stats.chosen_e, aux.stats.chosen_e)
  np.testing.assert_array_equal(above.state['nested_logits'], aux.state['nested_logits'])
  assert 0.25 < first.active_share(S) < 0.5
