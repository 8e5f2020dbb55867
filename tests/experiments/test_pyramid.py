"""Pyramids: later mixtures have more experts (PR-MoE); one loop for each run of equal layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import common
from experiments.check_routing import check_routing
from experiments.errors import BadInput
from experiments.flops import active_share, training_flops
from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef, TrainState
from experiments.step import Control, make_train_step
from moejax.mesh.make import make_mesh
from moejax.transformer import count_params
from tests.experiments.test_heads import B, S, V, batch
from tests.experiments.test_mixtures import STREAM

D, F = 8, 12


def config_of(pyramid='2,2,4', layers='1,2,4', **moe):
  config = common.get_config()
  config.batch_size, config.data.sequence_length = B, S
  config.model.update({'d_model': D, 'num_layers': 5, 'num_heads': 2, 'd_ff': F})
  last = int(pyramid.split(',')[-1]) if pyramid else 4
  config.model.moe.update(
    {'layers': layers, 'pyramid': pyramid, 'num_experts': last, 'num_shared': 1}
  )
  for key, value in moe.items():
    config.model.moe[key] = value
  return config


def settings_of(*arguments, **moe):
  return Settings.from_config(config_of(*arguments, **moe))


def definition_of(settings):
  return ModelDef(model_maker(settings, STREAM, make_mesh(devices=jax.devices()[:1])))


def shapes(settings):
  return jax.eval_shape(definition_of(settings).init, jax.random.key(0))[0]


def test_parameters_and_work_counted_by_hand():
  settings = settings_of()
  check_routing(settings)
  counts = count_params(shapes(settings))
  expert = 3 * D * F
  assert counts['moe/experts'] == (2 + 2 + 4) * expert
  assert counts['moe/router'] == (2 + 2 + 4) * D
  assert counts['moe/shared'] == 3 * expert
  # two experts of each work on a token: all of the first two layers, half of the last
  assert active_share(settings, STREAM) == pytest.approx((2 + 2 + 2) / 8)
  flat = settings_of('', num_experts=4)
  less = 3 * B * S * 2 * D * (3 * 4 - (2 + 2 + 4))  # routers alone differ
  assert training_flops(flat, STREAM) - training_flops(settings, STREAM) == pytest.approx(less)


def test_runs_of_equal_layers_are_one_loop_each():
  """Layers d 2 2 d 4: four blocks are compiled, not five."""
  segments = shapes(settings_of())['stack']['segments']
  repeats = [jax.tree.leaves(segment)[0].shape[0] for segment in segments.values()]
  assert repeats == [1, 2, 1]  # d, twice 2, then d and 4
  periodic = shapes(settings_of('2,2,4,4', '0,1,2,3'))['stack']['segments']
  assert [jax.tree.leaves(segment)[0].shape[0] for segment in periodic.values()] == [2, 2, 1]


def test_value_and_gradient_are_those_of_layers_one_by_one():
  maker = model_maker(settings_of(), STREAM, one_device())
  graph, state = nnx.split(nnx.jit(lambda: maker(nnx.Rngs(0)))())
  tokens = batch()['tokens']
  target = jax.random.normal(jax.random.key(1), (B, S, V))

  def stacked(state):
    logits, stats = nnx.merge(graph, state)(tokens)
    return (logits * target).sum(), (logits, [record.chosen_e.sum(1) for record in stats])

  def one_by_one(state):
    model = nnx.merge(graph, state)
    x, context, turn, visible = model.enter(tokens)
    context = model.stack.prepare(x, context, visible)
    chosen = []
    for block in model.stack.unstack():
      x, stats, left = block(x, context, turn, visible)
      context = dataclasses.replace(context, state=left)
      chosen += [record.chosen_e for record in stats]
    assert [c.size for c in chosen] == [2, 2, 4]
    logits = model.logits(model.norm(x))
    return (logits * target).sum(), (logits, [jnp.stack([c.sum() for c in chosen])])

  got = jax.jit(jax.grad(stacked, has_aux=True))(state)
  want = jax.jit(jax.grad(one_by_one, has_aux=True))(state)
  for a, b in zip(jax.tree.leaves(got[0]), jax.tree.leaves(want[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  np.testing.assert_allclose(got[1][0], want[1][0], atol=1e-5)
  np.testing.assert_array_equal(jnp.concatenate(got[1][1]), want[1][1][0])


def one_device():
  return make_mesh(devices=jax.devices()[:1])


def test_losses_biases_and_metrics_are_of_every_layer():
  router = {'name': 'top_k', 'k': 2, 'balance_bias': True}
  settings = settings_of('2,4', '0,1', router=router, losses={'balance': 1.0})
  definition = definition_of(settings)
  optimizer = optax.sgd(0.0)
  step = make_train_step(
    definition, optimizer, microbatches=2, losses={'balance': 1.0}, bias_rate=0.5
  )

  def first_step(key, control):
    params, routing = definition.init(key)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, routing, optimizer.init(params), zero, zero)
    return step(state, batch(), control)

  control = Control(np.uint32(0), np.float32(0), np.float32(0))
  state, metrics = jax.jit(first_step)(jax.random.key(0), control)
  assert metrics['load'].shape == (2, 4)
  np.testing.assert_allclose(metrics['load'].sum(1), 1, rtol=1e-5)
  np.testing.assert_array_equal(metrics['load'][0, 2:], 0)
  assert float(metrics['total_loss'] - metrics['loss']) == pytest.approx(
    2 * float(metrics['balance_loss']), rel=1e-4
  )
  small, large = sorted((leaf[0] for leaf in jax.tree.leaves(state.routing)), key=jnp.size)
  np.testing.assert_array_equal(small, 0)  # both of two experts have every token
  load = np.asarray(metrics['load'][1])
  np.testing.assert_array_equal(large, 0.5 * np.sign(0.25 - load))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'pyramid': '4,2,2'}, "model.moe.pyramid='4,2,2' is not accepted: it must be 3 numbers"),
    ({'pyramid': '4,4'}, 'it must be 3 numbers, one a mixture'),
    ({'pyramid': '2,2,8'}, 'it must be the last of model.moe.pyramid=2,2,8'),
    ({'pyramid': '2,x'}, "it must be '' or numbers of experts such as '4,4,8'"),
    ({'router': {'name': 'gating_residual'}}, 'accepted are routers without a state over depth'),
    ({'pyramid': '1,2,4'}, 'model.moe: k=2 with num_experts=1'),
  ],
)
def test_what_does_not_fit_is_one_sentence(change, message):
  config = config_of()
  for key, value in change.items():
    config.model.moe[key] = value
  with pytest.raises(BadInput, match=message):
    check_routing(Settings.from_config(config))
