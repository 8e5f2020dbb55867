"""AdamW: the first updates by hand, what is decayed, what is clipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import common
from experiments.optim import decay_mask, make_optimizer
from experiments.settings import Settings


@pytest.fixture(autouse=True)
def _standard_promotion():
  """optax multiplies int32 counters with floats."""
  with jax.numpy_dtype_promotion('standard'):
    yield


def _optim(**changes):
  optim = Settings.from_config(common.get_config()).optim
  usual = {'schedule': 'constant', 'learning_rate': 0.1, 'warmup_steps': 0, 'eps': 1e-30}
  return dataclasses.replace(optim, **{'clip_norm': 0.0, 'weight_decay': 0.0, **usual, **changes})


def _reference(param, gradients, optim, decays):
  """Algorithm 2 of Loshchilov & Hutter 2019 in float64."""
  m = v = 0.0
  for count, gradient in enumerate(gradients, 1):
    m = optim.b1 * m + (1 - optim.b1) * gradient
    v = optim.b2 * v + (1 - optim.b2) * gradient**2
    step = (m / (1 - optim.b1**count)) / (np.sqrt(v / (1 - optim.b2**count)) + optim.eps)
    param = param - optim.learning_rate * (step + optim.weight_decay * param * decays)
  return param


def test_three_updates_equal_the_published_algorithm():
  optim = _optim(weight_decay=0.3)
  rng = np.random.default_rng(0)
  params = {'weight': rng.normal(size=(3, 4)), 'norm': {'scale': rng.normal(size=(2, 4))}}
  gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(3)]
  now = jax.tree.map(jnp.float32, params)
  optimizer = make_optimizer(optim, now)
  state = optimizer.init(now)
  for gradient in gradients:
    updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, now)
    now = optax.apply_updates(now, optax.tree.scale(optim.learning_rate, updates))
  for name, decays in (('weight', 1.0), ('norm', 0.0)):
    get = (lambda tree: tree['norm']['scale']) if name == 'norm' else (lambda tree: tree['weight'])
    expected = _reference(get(params), [get(one) for one in gradients], optim, decays)
    np.testing.assert_allclose(get(now), expected, rtol=2e-5, atol=2e-6)


def test_the_norm_of_all_gradients_together_is_clipped():
  optim = _optim(clip_norm=1.0)
  params = {'a': jnp.zeros((2, 2)), 'b': jnp.zeros(1)}
  optimizer = make_optimizer(optim, params)

  def first_moment(scale):
    gradients = {
      'a': jnp.full((2, 2), 2.0 * scale),
      'b': jnp.full(1, 3.0 * scale),
    }  # norm 5 * scale
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    return optax.tree_utils.tree_get(state, 'mu')

  np.testing.assert_allclose(first_moment(1.0)['a'], 0.1 * 2 / 5, rtol=1e-6)
  np.testing.assert_allclose(first_moment(100.0)['b'], 0.1 * 3 / 5, rtol=1e-6)
  np.testing.assert_allclose(first_moment(0.1)['b'], 0.1 * 0.3, rtol=1e-6)  # norm 0.5: untouched


def test_matrices_are_decayed_and_scales_biases_and_embeddings_are_not():
  params = {
    'embed': {'weight': jnp.ones((5, 4))},
    'positions': jnp.ones((6, 4)),
    'norm': {'scale': jnp.ones(4)},
    'head': {'weight': jnp.ones((4, 5)), 'bias': jnp.ones(5)},
    'blocks': {  # stacked over three layers
      'attention': {'query': {'weight': jnp.ones((3, 4, 4))}, 'query_norm': {'scale': jnp.ones((3, 4))}},
      'moe': {
        'router': {'kernel': jnp.ones((3, 4, 8)), 'bias': jnp.ones((3, 8)), 'scale': jnp.ones((3, 1))},
        'experts': {'w_up': jnp.ones((3, 8, 4, 4))},
        'output_scale': jnp.ones((3, 4)),
      },
    },
  }  # fmt: skip
  mask = decay_mask(params)
  flat, _ = jax.tree_util.tree_flatten_with_path(mask)
  decayed = {jax.tree_util.keystr(path, simple=True, separator='/') for path, yes in flat if yes}
  assert decayed == {
    'head/weight',
    'blocks/attention/query/weight',
    'blocks/moe/router/kernel',
    'blocks/moe/experts/w_up',
  }


def test_an_nnx_state_gets_the_same_mask_and_optimizer():
  class Model(nnx.Module):
    def __init__(self):
      self.kernel = nnx.Param(jnp.ones((2, 3)))
      self.scale = nnx.Param(jnp.ones((2, 3)))

  _, state = nnx.split(Model())
  assert jax.tree.leaves(decay_mask(state)) == [True, False]
  optimizer = make_optimizer(_optim(weight_decay=0.5), state)
  updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, state), optimizer.init(state), state)
  kernel, scale = jax.tree.leaves(updates)
  np.testing.assert_allclose(kernel, -0.5, rtol=1e-6)
  np.testing.assert_array_equal(scale, 0.0)


@pytest.mark.parametrize('clip, decay', [(0.0, 0.0), (0.0, 0.1), (1.0, 0.0), (1.0, 0.1)])
def test_the_saved_state_has_one_structure_whatever_is_on(clip, decay):
  params = {'weight': jnp.ones((2, 2))}
  state = make_optimizer(_optim(clip_norm=clip, weight_decay=decay), params).init(params)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
  assert paths == ['[1].count', "[1].mu['weight']", "[1].nu['weight']"]


def test_offsets_of_a_router_are_biases_and_not_decayed():
  """Of stacked layers they have two axes, as the matrices of one layer do."""
  scorer = {name: jnp.zeros((2, 4)) for name in ('offset', 'over_offset', 'gate_in_offset')}
  params = {'router': {'scorer': scorer | {'kernel': jnp.zeros((2, 8, 4))}}}
  decayed = decay_mask(params)['router']['scorer']
  assert {name for name, decays in decayed.items() if decays} == {'kernel'}
