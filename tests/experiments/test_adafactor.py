"""Adafactor against the published algorithm in NumPy, its state's shapes, and where they lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments.optim import decay_rates, make_optimizer
from experiments.settings import AdafactorSettings, Settings
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import like_params, param_shardings, path_name

pytestmark = pytest.mark.usefixtures('standard_promotion')
GLAM = {'b1': 0.0, 'b2': 0.99, 'adafactor': AdafactorSettings(1.0, True, 4)}
SCALING_VIT = {'b1': 0.9, 'b2': 0.999, 'adafactor': AdafactorSettings(0.0, False, 4)}


def settings(**changes):
  optim = Settings.from_config(common.get_config()).optim
  return dataclasses.replace(
    optim, name='adafactor', clip_norm=0.0, weight_decay=0.0, decay_of={}, **changes
  )


def reference(params, gradients, optim, rate):
  """Algorithm 4 of Shazeer & Stern 2018 on one matrix `[n, m]`, with the first moment of algorithm 5."""
  rows, columns, moment = np.zeros(params.shape[0]), np.zeros(params.shape[1]), 0.0
  for step, gradient in enumerate(gradients, 1):
    decay = min(optim.b2, 1 - step**-0.8)
    square = gradient**2 + 1e-30
    rows = decay * rows + (1 - decay) * square.sum(1)
    columns = decay * columns + (1 - decay) * square.sum(0)
    update = gradient / np.sqrt(np.outer(rows, columns) / rows.sum())
    if optim.adafactor.clip_threshold:
      update /= max(1, np.sqrt((update**2).mean()) / optim.adafactor.clip_threshold)
    if optim.adafactor.parameter_scale:
      update *= max(1e-3, np.sqrt((params**2).mean()))
    if optim.b1:
      update = moment = optim.b1 * moment + (1 - optim.b1) * update
    params = params - rate * update
  return params


@pytest.mark.parametrize('changes', [GLAM, SCALING_VIT], ids=['glam', 'scaling_vit'])
def test_updates_equal_the_published_algorithm_layer_by_layer(changes):
  """Two layers of unlike sizes of weights and gradients, stacked: each is as it would be alone."""
  optim = settings(**changes)
  rng = np.random.default_rng(0)
  sizes = np.array([1.0, 30.0]).reshape(2, 1, 1)
  weight = rng.normal(size=(2, 5, 6)) * sizes
  gradients = [rng.normal(size=(2, 5, 6)) / sizes * 10.0**k for k in (0, 2, -1)]
  now = {'stack': {'segments': {'0': {'weight': jnp.float32(weight)}}}}
  optimizer = make_optimizer(optim, now)
  state = optimizer.init(now)
  for gradient in gradients:
    grads = jax.tree.map(lambda _, g=gradient: jnp.float32(g), now)
    updates, state = optimizer.update(grads, state, now)
    now = optax.apply_updates(now, optax.tree.scale(0.1, updates))
  expected = [reference(weight[i], [g[i] for g in gradients], optim, 0.1) for i in range(2)]
  found = now['stack']['segments']['0']['weight']
  # the first moment is kept in bfloat16: eight bits of an update of about 0.1
  np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5, atol=2e-3 if optim.b1 else 1e-5)


@pytest.mark.parametrize('changes', [GLAM, SCALING_VIT], ids=['glam', 'scaling_vit'])
def test_the_loss_falls(changes):
  optim = settings(**changes)
  rng = np.random.default_rng(0)
  x, w = jnp.float32(rng.normal(size=(32, 8))), jnp.float32(rng.normal(size=(8, 6)))
  params = {'weight': jnp.float32(rng.normal(size=(8, 6))), 'bias': jnp.ones(6)}
  optimizer = make_optimizer(optim, params)

  def loss(params):
    return jnp.mean((x @ params['weight'] + params['bias'][None, :] - x @ w) ** 2)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, optax.tree.scale(0.05, updates)), state

  before, state = float(loss(params)), optimizer.init(params)
  for _ in range(30):
    params, state = step(params, state)
  assert float(loss(params)) < before / 3


def shapes(changes, params):
  state = jax.eval_shape(make_optimizer(settings(**changes), params).init, params)
  return state, {
    path_name(path): (leaf.shape, leaf.dtype)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
  }


BANK = 'moe/experts/w_up'


def bank(*shape):
  return {'moe': {'experts': {'w_up': jax.ShapeDtypeStruct(shape, jnp.float32)}}}


def test_second_moments_are_two_vectors_and_the_first_is_half_as_wide():
  _, found = shapes(SCALING_VIT, bank(3, 4, 8, 16))
  sizes = {name.split('/', 2)[2]: leaf for name, leaf in found.items() if name.endswith(BANK)}
  assert sizes[f'v_row/{BANK}'][0] == (3, 4, 8)
  assert sizes[f'v_col/{BANK}'][0] == (3, 4, 16)
  assert sizes[f'v/{BANK}'][0] == (1,)
  assert sizes[f'ema/{BANK}'] == ((3, 4, 8, 16), jnp.bfloat16)
  _, without = shapes(GLAM, bank(3, 4, 8, 16))
  assert not any('ema' in name for name in without)


@pytest.mark.parametrize(('width', 'hidden', 'row'), [(8, 16, 'fsdp'), (8, 8, None)])
def test_factors_lie_where_their_parameter_does(width, hidden, row):
  """Of a square matrix either axis may be the one that is gone: its factors are cut by expert alone."""
  mesh = make_mesh(1, 2, 2, 2, devices=jax.devices())
  params = bank(3, 4, width, hidden)
  state, _ = shapes(SCALING_VIT, params)
  placed = like_params(mesh, state, params, param_shardings(mesh, params))
  specs = {
    path_name(path).split('/', 2)[-1]: tuple(sharding.spec)
    for path, sharding in jax.tree_util.tree_leaves_with_path(placed)
  }
  assert specs[f'v_row/{BANK}'] == (None, 'expert', row)
  assert specs[f'v_col/{BANK}'] == (None, 'expert', 'tensor' if row else None)
  assert specs[f'ema/{BANK}'] == (None, 'expert', 'fsdp', 'tensor')
  assert specs[f'v/{BANK}'] == ()


def test_an_array_that_follows_no_parameter_is_refused():
  mesh = make_mesh(devices=jax.devices())
  params = bank(3, 4, 8, 16)
  stray = {'mu': bank(3, 5, 8)}
  with pytest.raises(ValueError, match=r'mu/moe/experts/w_up of shape \(3, 5, 8\) follows no'):
    like_params(mesh, stray, params, param_shardings(mesh, params))


def test_decay_of_a_path_takes_the_place_of_the_usual_one():
  params = {
    'head': {'weight': jnp.ones((2, 3)), 'bias': jnp.ones(3)},
    'router': {'phi': jnp.ones((2, 3)), 'scale': jnp.ones(())},
    'up': {'weight': jnp.ones((2, 2))},
  }
  decay = {'weight': 0.5, 'head/weight': 3.0, 'router/phi': 0.0, 'scale': 0.03}
  optim = dataclasses.replace(settings(**GLAM), weight_decay=0.1, decay_of=decay)
  assert decay_rates(optim, params) == {
    'head': {'weight': 3.0, 'bias': 0.0},
    'router': {'phi': 0.0, 'scale': 0.03},
    'up': {'weight': 0.5},
  }
  zeros = jax.tree.map(jnp.zeros_like, params)
  for name in ('adamw', 'adafactor'):
    optimizer = make_optimizer(dataclasses.replace(optim, name=name), params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates['head']['weight'], -3.0)
    np.testing.assert_allclose(updates['router']['scale'], -0.03)


def test_a_decay_of_no_parameter_is_refused():
  optim = dataclasses.replace(settings(**GLAM), decay_of={'haed/weight': 3.0})
  with pytest.raises(ValueError, match="optim.decay_of='haed/weight' is the end of no parameter"):
    make_optimizer(optim, {'head': {'weight': jnp.ones((2, 2))}})
