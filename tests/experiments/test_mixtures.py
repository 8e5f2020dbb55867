"""From settings to models: every kind of mixture and every state of a router has its place, its work and its losses."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments.check_routing import check_routing, check_vocabulary
from experiments.errors import BadInput
from experiments.flops import active_share, training_flops
from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef, TrainState
from experiments.step import Control, make_train_step
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import param_shardings
from moejax.moe.kinds import BARE
from moejax.transformer import count_params

STREAM = types.SimpleNamespace(vocab_size=16, image_shape=None, num_classes=None)
CASES = {
  'plain': {},
  'unlike widths': {'options': {'widths': (1, 2, 2, 3)}, 'losses': {'cost_balance': 0.1}},
  'residual': {'kind': 'residual', 'options': {'core_noise': 0.1}},
  'multi_head': {'kind': 'multi_head', 'options': {'heads': 2}},
  'cartesian': {'kind': 'cartesian', 'num_shared': 1},
  'peer': {'kind': 'peer', 'options': {'heads': 2, 'k': 2, 'query_width': 4}},
  'deep': {'kind': 'deep', 'losses': {'importance': 0.1}},
  'nested': {'kind': 'nested', 'allow_leak': True},
  'rmoe': {
    'router': {'name': 'rmoe', 'width': 4, 'share_cell': True},
    'momentum': {'name': 'adam'},
  },
  'read_me': {'router': {'name': 'read_me', 'width': 4}},
  'moe_plus_plus': {
    'router': {
      'name': 'gating_residual',
      'capacity_factor': 1.1,
      'capacity_shares': (3, 3, 3, 3, 4, 4),
    },
    'zero_experts': {'copy': 1, 'zero': 1},
    'zero_cost': 0.75,
    'losses': {'cost_balance': 0.01},
  },
}


def settings_config(allow_leak=False, **moe):
  config = common.get_config()
  config.allow_leak = allow_leak
  config.batch_size, config.data.sequence_length = 2, 6
  config.model.update({'d_model': 8, 'num_layers': 4, 'num_heads': 2, 'd_ff': 24})
  config.model.moe.num_experts = 4
  config.model.moe.layers = 'every_2'
  for key, value in moe.items():
    config.model.moe[key] = value
  return config


def settings_of(**moe):
  return Settings.from_config(settings_config(**moe))


@pytest.mark.parametrize('case', CASES)
def test_every_mixture_of_a_config_has_its_place_and_takes_a_step(case):
  """Shapes alone: nothing is compiled."""
  settings = settings_of(**CASES[case])
  check_routing(settings)
  mesh = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, STREAM, mesh))
  params, routing = jax.eval_shape(definition.init, jax.random.key(0))
  assert param_shardings(mesh, params)
  assert param_shardings(mesh, routing) is not None
  counts = count_params(params)
  assert counts['moe/experts'] > 0
  assert 0 < active_share(settings, STREAM) <= 1
  assert training_flops(settings, STREAM) > training_flops(settings_of(layers='none'), STREAM) / 2
  optimizer = optax.sgd(1.0)
  step = make_train_step(
    definition, optimizer, microbatches=1, losses=settings.model.moe.losses, bias_rate=0.0
  )

  def first_step(key, control):
    params, routing = definition.init(key)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, routing, optimizer.init(params), zero, zero)
    rows = jnp.zeros((2, 6), jnp.int32)
    names = ('tokens', 'targets', 'positions')
    batch = dict.fromkeys(names, rows) | {'segment_ids': rows + 1, 'loss_mask': rows == 0}
    return step(state, batch, control)

  control = Control(np.uint32(0), np.float32(1), np.float32(0))
  state, metrics = jax.eval_shape(first_step, jax.random.key(0), control)
  assert metrics['load'].shape[0] == 2
  assert jax.tree.structure(state.params) == jax.tree.structure(params)


def test_a_router_that_needs_what_the_data_do_not_have_is_refused():
  with pytest.raises(BadInput, match="needs task, which data.name='wiki6' has none of"):
    check_routing(settings_of(router={'name': 'm3vit'}))


def test_nested_experts_of_a_causal_model_are_refused():
  with pytest.raises(BadInput, match="model.moe.kind='nested' lets a token see later ones"):
    check_routing(settings_of(kind='nested'))


def test_an_option_that_a_kind_does_not_have_is_refused():
  with pytest.raises(BadInput, match="model.moe: option 'heads' of kind 'deep': accepted are gate"):
    check_routing(settings_of(kind='deep', options={'heads': 2}))


@pytest.mark.parametrize('kind', sorted(BARE))
@pytest.mark.parametrize(
  ('key', 'value', 'sentence'),
  [
    ('model.moe.router', {'name': 'switch'}, "^model.moe: router.name='switch' with kind"),
    ('model.moe.router', {'name': 'top_k', 'k': 4}, '^model.moe: router.k=4 with kind'),
    ('model.moe.router', {'name': 'top_k', 'balance_bias': True}, 'router.balance_bias=True with'),
    ('model.moe.losses', {'load': 0.1}, r'^model.moe: losses.load=0.1 with kind .*: accepted are'),
    ('optim.bias_rate', 0.001, '^optim.bias_rate=0.001 with model.moe.kind=.*: accepted is 0$'),
    ('optim.average_rate', 0.3, '^optim.average_rate=0.3 with model.moe.kind=.*: accepted is 0$'),
    ('model.moe.dispatch', 'sorted', "^model.moe.dispatch='sorted'.*: it must be 'fused' with"),
    ('model.moe.exchange', 'local', "^model.moe.exchange='local'.*: it must be 'auto' with"),
  ],
)
def test_what_a_kind_with_a_router_of_its_own_cannot_use_is_refused(kind, key, value, sentence):
  config = settings_config(**CASES[kind])
  check_routing(Settings.from_config(config))
  section, _, name = key.rpartition('.')
  setattr(functools.reduce(getattr, section.split('.'), config), name, value)
  with pytest.raises(BadInput, match=sentence):
    check_routing(Settings.from_config(config))


def test_a_wrong_router_of_a_model_with_skipped_blocks_is_one_sentence():
  config = settings_config(allow_leak=True, router={'name': 'topk'})
  config.model.depth.layers = '1'
  with pytest.raises(BadInput, match="^model.moe: router name='topk': accepted are"):
    check_routing(Settings.from_config(config))


def test_a_model_whose_tokens_skip_blocks_is_counted_and_takes_a_step():
  """Every other of four layers, a third of six tokens: two; its router and predictor beside."""
  config = settings_config(layers='none')
  config.model.depth.update({'layers': 'every_2', 'capacity': 1 / 3})
  with pytest.raises(BadInput, match='lets later tokens decide in training who skips a block'):
    check_routing(Settings.from_config(config))
  config.allow_leak = True
  settings = Settings.from_config(config)
  check_routing(settings)
  mesh = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, STREAM, mesh))
  params = jax.eval_shape(definition.init, jax.random.key(0))[0]
  assert param_shardings(mesh, params)
  counts = count_params(params)
  assert counts['depth/router'] == 2 * (8 + (8 * 8 + 8) + (8 + 1))
  assert counts['attention'] == 4 * (4 * 8 * 8 + 2 * 4)
  weights = 2 * (4 * 8 * 8 + 3 * 8 * 24)
  scores = lambda length: 2 * length * 2 * 2 * 4
  whole, skipped = 6 * 2 * (weights + scores(6)), 2 * 2 * (weights + scores(2))
  around = 6 * (2 * 8 * 16 + 2 * (2 * 8 + 2 * 9 * 8))
  assert training_flops(settings, STREAM) == 3 * 2 * (whole + skipped + around)


def test_the_bias_of_sub_tokens_can_be_moved():
  """MH-MoE with loss-free balancing: its router has a bias as that of plain experts has."""
  config = common.get_config()
  config.model.moe.kind = 'multi_head'
  config.model.moe.router = {'name': 'top_k', 'k': 2, 'balance_bias': True}
  config.optim.bias_rate = 1e-3
  check_routing(Settings.from_config(config))


@pytest.mark.parametrize(
  ('router', 'option'),
  [
    ({'name': 'mask_moe', 'vocab_size': 255}, 'vocab_size'),
    ({'name': 'hash', 'counts': (1,) * 255}, 'counts'),
  ],
)
def test_a_router_by_token_id_knows_all_ids(router, option):
  config = common.get_config()
  config.model.moe.router = router
  settings = Settings.from_config(config)
  check_vocabulary(settings, 255)
  with pytest.raises(BadInput, match=f'{option} of 255 ids is less than the 256 of data.tokenizer'):
    check_vocabulary(settings, 256)
