"""The published image recipe end to end, in miniature: crops, sigmoid outputs, Adafactor, on a mesh."""

import jax
import numpy as np
import pytest

from configs import soft_moe_imagenet
from experiments.build import assemble, build_program
from experiments.errors import BadInput
from experiments.place import place_batch
from experiments.settings import Settings
from experiments.step import controls

pytestmark = pytest.mark.usefixtures('standard_promotion')


def small(**changes):
  """The recipe of s16 on 28-pixel digits: two layers of width 16, of which one is a mixture of four experts."""
  config = soft_moe_imagenet.get_config('s16')
  config.data.update({'name': 'mnist5k', 'eval_split': 'test', 'image_size': 0})
  config.model.update({'d_model': 16, 'd_ff': 32, 'num_layers': 2, 'num_heads': 2})
  config.model.update({'patch_size': 14, 'head_bias': -1.0})
  config.model.moe.num_experts = 4
  config.update({'batch_size': 32, 'steps': 20})
  config.optim.update({'warmup_steps': 5, 'cooldown_steps': 5, 'learning_rate': 3e-2})
  config.optim.name = 'adafactor'
  config.optim.adafactor.update({'factor_from': 16, 'parameter_scale': False})
  config.mesh.update({'fsdp': 2, 'expert': 2})
  config.update_from_flattened_dict(changes)
  return Settings.from_config(config)


def test_the_recipe_trains_on_a_mesh():
  settings = small()
  parts = assemble(settings)
  program, control = parts.program, controls(settings.optim, 0, settings.steps)
  state = program.init(jax.random.key(0))
  np.testing.assert_array_equal(state.params['head']['bias'], -1.0)
  factors = [
    (leaf.shape, leaf.sharding.spec)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if 'v_col' in str(path) and 'w_up' in str(path)
  ]
  assert factors == [((1, 4, 32), jax.sharding.PartitionSpec(None, 'expert', 'tensor'))]
  losses = []
  for step in range(settings.steps):
    batch = place_batch(program.mesh, parts.train_stream.batch(step))
    state, metrics = program.train_step(state, batch, control(step))
    losses.append(float(metrics['loss']))
  # ten classes, of which one is right: 10 binary cross-entropies at logits of -1
  assert losses[0] == pytest.approx(9 * np.log1p(np.exp(-1)) + np.log1p(np.exp(1)), rel=1e-5)
  assert np.mean(losses[-5:]) < 0.9 * losses[0]


def test_a_decay_of_no_parameter_is_refused_before_anything_runs():
  settings = small(**{'model.moe.layers': 'none'})
  with pytest.raises(BadInput, match="optim.decay_of='moe/router/scorer/"):
    build_program(settings, assemble(small()).train_stream)


@pytest.mark.parametrize(
  ('key', 'value', 'sentence'),
  [
    ('model.positions', 'relative', "'rotary' for model.kind='vit'"),
    ('optim.consistency', 0.1, "0 with model.output='sigmoid'"),
    ('data.eval_crop', 0.0, 'more than 0 and at most 1'),
  ],
)
def test_settings_that_do_not_go_together_are_refused(key, value, sentence):
  with pytest.raises(BadInput, match=f'{key}=.*{sentence}'):
    small(**{key: value})
