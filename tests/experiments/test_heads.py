"""Attention of experts by its name in a config: it trains, its losses count, and what does not fit is one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import common
from experiments.check_routing import check_routing
from experiments.errors import BadInput
from experiments.flops import training_flops
from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef, make_state
from experiments.step import Control, make_train_step
from experiments.sweeps.record import size
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import param_shardings
from moejax.transformer import count_params
from tests.experiments.test_mixtures import STREAM

V, B, S = 16, 4, 6


def settings_of(attention, moe_layers='none', router=None, **heads):
  config = common.get_config()
  config.batch_size, config.data.sequence_length = B, S
  config.model.update(
    {'attention': attention, 'd_model': 8, 'num_layers': 2, 'num_heads': 2, 'd_ff': 12}
  )
  config.model.qk_norm = False
  config.model.moe.layers, config.model.moe.num_experts = moe_layers, 4
  config.model.heads.update({'num_experts': 3, **heads})
  if router:
    config.model.heads.router = router
  return Settings.from_config(config)


def make_step(settings, **options):
  mesh = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, STREAM, mesh))
  init, _, optimizer = make_state(definition, lambda params: optax.sgd(1.0), mesh)
  step = make_train_step(
    definition,
    optimizer,
    losses=settings.model.moe.losses,
    other_losses={'attention': settings.model.heads.losses},
    bias_rate=0.0,
    **options,
  )
  state = init(jax.random.key(0))
  assert param_shardings(mesh, state.params)
  return state, jax.jit(step)


def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, V, (B, S + 1)).astype(np.int32)
  rows = np.ones((B, S), np.int32)
  places = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
  return {
    'tokens': jnp.asarray(tokens[:, :-1]),
    'targets': jnp.asarray(tokens[:, 1:]),
    'positions': jnp.asarray(places),
    'segment_ids': jnp.asarray(rows),
    'loss_mask': jnp.asarray(rows > 0),
  }


CONTROL = Control(np.uint32(0), np.float32(0.1), np.float32(0))


@pytest.mark.parametrize(('attention', 'moe_layers'), [('experts', '1'), ('switch_head', 'none')])
def test_a_model_of_such_attention_learns_its_batch(attention, moe_layers):
  settings = settings_of(attention, moe_layers, losses={'balance': 0.01})
  check_routing(settings)
  state, step = make_step(settings, microbatches=1)
  before = jax.tree.map(np.asarray, state.params)
  losses = []
  for _ in range(12):
    state, metrics = step(state, batch(), CONTROL)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.2
  entries = 3 if attention == 'experts' else 2 * 2 * 3
  assert metrics['attention_load'].shape == (2, entries)
  np.testing.assert_allclose(metrics['attention_load'].sum(1), 1, rtol=1e-5)
  assert ('load' in metrics) == (moe_layers == '1')
  for (path, old), new in zip(
    jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params), strict=True
  ):
    assert float(np.abs(old - new).max()) > 0, path


def test_accumulation_leaves_the_balance_of_heads_unchanged():
  settings = settings_of('experts', losses={'balance': 3.0})
  found = []
  for microbatches in (1, 2):
    state, step = make_step(settings, microbatches=microbatches)
    found.append(step(state, batch(), CONTROL))
  (one, whole), (two, cut) = found
  for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert float(whole['total_loss']) == pytest.approx(float(cut['total_loss']), rel=1e-5)
  assert float(whole['total_loss']) > float(whole['loss']) + 5  # two layers of 3.0 times at least 1


def test_work_and_parameters_of_the_model_count_its_heads():
  plain, heads = settings_of('grouped'), settings_of('experts')
  grouped = 2 * 8 * 8 * 4 + 2 * S * 2 * 2 * 4
  routed = 2 * 8 * 4 * (2 * 2 + 2) + 2 * S * 2 * 2 * 4 + 2 * 8 * 3
  difference = training_flops(heads, STREAM) - training_flops(plain, STREAM)
  assert difference == 3 * B * S * 2 * (routed - grouped)
  definition = ModelDef(model_maker(heads, STREAM, make_mesh(devices=jax.devices()[:1])))
  counts = count_params(jax.eval_shape(definition.init, jax.random.key(0))[0])
  assert counts['attention/experts'] == 2 * 3 * 2 * 8 * 4
  assert counts['attention/router'] == 2 * 8 * 3
  sizes = size(heads, counts, 1, 1.0, 1.0, 2 / 3)
  assert sizes['N'] - sizes['N_active'] == counts['attention/experts'] // 3


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'router': {'name': 'expert_choice'}}, 'model.heads: attention experts with this router'),
    ({'router': {'name': 'topk'}}, "model.heads: router name='topk': accepted are ada_moe"),
    ({'router': {'name': 'rmoe'}}, 'has a bias, a state over depth or needs more'),
    ({'router': {'name': 'top_k', 'balance_bias': True}}, 'has a bias'),
    ({'options': {'k': 2}}, "model.heads: option 'k' of 'experts': accepted are kind"),
    ({'losses': {'balanced': 1.0}}, "model.heads: loss 'balanced': accepted are balance"),
    (
      {'router': {'name': 'top_k', 'capacity_factor': 1.0, 'priority': 'score'}},
      'lets a token see later ones',
    ),
  ],
)
def test_what_does_not_fit_is_one_sentence(change, message):
  with pytest.raises(BadInput, match=message):
    check_routing(settings_of('experts', **change))


def test_query_norms_are_refused():
  config = common.get_config()
  config.model.attention = 'switch_head'
  with pytest.raises(BadInput, match="must be False with model.attention='switch_head'"):
    Settings.from_config(config)
