import jax
import numpy as np
import pytest
from flax import nnx

from moejax.moe.layer import MoE
from moejax.placement import choices_of, loads, order_of, permute_experts, transitions
from moejax.placement.routing_trace import routing_trace
from moejax.transformer import Decoder

E, K, L = 6, 2, 4
trace = nnx.jit(routing_trace)


def decoder(router=None, **options):
  router = router or {'name': 'top_k', 'k': K, 'balance_bias': True, 'weighting': 'sigmoid_norm'}
  moe = lambda rngs: MoE(16, 8, E, router, losses={}, rngs=rngs, **options)
  return Decoder(20, 16, L, 2, 24, moe=moe, moe_layers=(0, 1, 3), rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def traced():
  """A model, tokens, and what its routers chose."""
  model = decoder()
  tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 20)
  return model, tokens, choices_of(trace(model, tokens))


def test_permuted_experts_compute_the_same_function(traced, rng):
  model, tokens, choices = traced
  run = nnx.jit(lambda model: model(tokens)[0])
  order = rng.permuted(np.tile(np.arange(E), (3, 1)), axis=1)
  before = run(model)
  moved = decoder()
  moved.stack = permute_experts(model.stack, order)
  np.testing.assert_allclose(run(moved), before, atol=1e-5)
  # what was expert order[l, e] now stands at place e, and rows follow
  again = choices_of(trace(moved, tokens))
  place = np.argsort(order, axis=1)
  for layer in range(3):
    np.testing.assert_array_equal(again[:, layer], place[layer][choices[:, layer]])
  # negative control: experts in another order under the router as it was are another function
  for old, new in zip(model.stack.segments, moved.stack.segments, strict=True):
    for before_block, block in zip(old.blocks, new.blocks, strict=True):
      if block.moe is not None:
        block.moe.router.scorer.kernel[...] = before_block.moe.router.scorer.kernel[...]
  assert np.abs(run(moved) - before).max() > 1e-2
  np.testing.assert_array_equal(run(model), before)


def test_a_trace_becomes_choices_transitions_and_loads(traced):
  _, _, choices = traced
  assert choices.shape == (18, 3, K)
  weights = transitions(choices, E)
  assert weights.sum() == 18 * 2 * K * K
  t = np.zeros((2, E, E))
  for token, layer, i, j in np.ndindex(18, 2, K, K):
    t[layer, choices[token, layer, i], choices[token, layer + 1, j]] += 1
  np.testing.assert_array_equal(weights, t)
  np.testing.assert_array_equal(loads(choices, E)[:-1].sum(1), [18 * K] * 2)


def test_experts_of_a_device_become_neighbours():
  order = order_of(np.array([[1, 0, 1, 0]]))
  np.testing.assert_array_equal(order, [[1, 3, 0, 2]])


@pytest.mark.parametrize(
  ('router', 'options'),
  [
    ({'name': 'group_limited', 'groups': 2, 'limit': 1}, {}),
    ({'name': 'cosine'}, {}),
    ({'name': 'top_k'}, {'zero_experts': {'copy': 1}}),
    ({'name': 'top_k'}, {'widths': (1, 2, 3, 3, 2, 1)}),
    ({'name': 'top_k', 'capacity_factor': 1.0, 'capacity_shares': (1, 2, 3, 3, 2, 1)}, {}),
  ],
)
def test_routers_that_know_more_of_an_experts_place_and_unlike_experts_are_refused(router, options):
  stack = decoder(router, **options).stack
  with pytest.raises(ValueError, match='cannot change places'):
    permute_experts(stack, np.tile(np.arange(E), (3, 1)))


@pytest.mark.parametrize(
  ('order', 'message'),
  [(np.zeros((3, E), int), 'no permutation'), (np.tile(np.arange(E), (5, 1)), 'order of 5 layers')],
)
def test_an_order_that_is_none_is_refused(order, message):
  with pytest.raises(ValueError, match=message):
    permute_experts(decoder().stack, order)


def test_a_trace_of_another_kind_is_refused(traced):
  _, tokens, _ = traced
  with pytest.raises(ValueError, match=r'trace=\[\]'):
    choices_of([])
  expert_choice = decoder({'name': 'expert_choice', 'capacity_factor': 1.0})
  with pytest.raises(ValueError, match='not token-major'):
    choices_of(trace(expert_choice, tokens))
  with pytest.raises(ValueError, match='one layer has no transitions'):
    transitions(np.zeros((4, 1, 2), int), E)
