"""`model.moe.implementation`: kernels asked for by name, and refused where they cannot run."""

import jax
import numpy as np
import pytest

from configs import tiny
from experiments.build import assemble
from experiments.check_routing import check_routing
from experiments.errors import BadInput
from experiments.place import place_batch
from experiments.settings import Settings
from experiments.step import controls
from pallas_kernels import chips

pytestmark = pytest.mark.usefixtures('standard_promotion')


def settings(implementation='auto', **changes):
  config = tiny.get_config()
  config.update({'batch_size': 8, 'steps': 1})
  config.model.moe.layers = 'all'
  config.model.update({'num_layers': 1, 'd_model': 32, 'd_ff': 32, 'num_heads': 2})
  config.data.sequence_length = 16
  config.model.moe.implementation = implementation
  config.update_from_flattened_dict(changes)
  return Settings.from_config(config)


def first_loss(chosen):
  """Of one step, from the model's loss before it; and the parts of the program."""
  parts = assemble(chosen)
  program, control = parts.program, controls(chosen.optim, 0, chosen.steps)
  batch = place_batch(program.mesh, parts.train_stream.batch(0))
  _, metrics = program.train_step(program.init(jax.random.key(0)), batch, control(0))
  return float(metrics['loss']), float(metrics['grad_norm'])


def test_a_run_on_a_body_by_name_is_the_run_on_another():
  """On a mesh of eight devices, loss and gradient norm."""
  np.testing.assert_allclose(first_loss(settings('blocks')), first_loss(settings('cpu')), rtol=1e-5)


@pytest.mark.parametrize(('body', 'chip'), [('ampere', 'A100'), ('gpu', 'H100'), ('tpu', 'TPU')])
def test_a_chip_that_is_not_there_is_one_sentence_before_anything_runs(body, chip):
  with pytest.raises(
    BadInput, match=f"^model.moe.implementation='{body}': .* needs .*{chip}.* not cpu"
  ):
    assemble(settings(body, **{'model.moe.dispatch': 'sorted'}))


@pytest.mark.parametrize(
  ('exchange', 'options', 'sentence'),
  [
    ('all_to_all', {'chunks': 3}, 'chunks=3: accepted are divisors of the 16 tokens of a device'),
    ('sparse_fsdp', {'hot': 3}, 'hot=3: accepted are 1 to 2, the experts of a device'),
    ('all_to_all', {'chunks': 'x'}, "chunks='x' of exchange='all_to_all': accepted are integers"),
  ],
)
def test_options_that_do_not_fit_a_device_are_refused_before_anything_runs(
  exchange, options, sentence
):
  changes = {'model.moe.exchange': exchange, 'model.moe.exchange_options': options}
  with pytest.raises(BadInput, match=f'^model.moe.*: {sentence}'):
    assemble(settings(**changes, **{'mesh.expert': 4}))


def test_widths_that_a_body_does_not_take_are_refused_while_they_are_traced(monkeypatch):
  monkeypatch.setattr(chips, 'check_device', lambda *args: None)
  usual = {'model.dtype': 'bfloat16'}
  with pytest.raises(BadInput, match='wants multiples of 128, d_model=32; accepted are'):
    assemble(settings('gpu', **usual))
  with pytest.raises(BadInput, match='multiplies rows of bfloat16 or float16, not float32'):
    assemble(settings('gpu'))
  wide = {'model.d_model': 128, 'model.d_ff': 128}
  assert not assemble(settings('gpu', **usual, **wide)).program.is_compiled


@pytest.mark.parametrize(
  ('changes', 'sentence'),
  [
    ({'model.moe.dispatch': 'einsum'}, "must be 'auto' with model.moe.dispatch='einsum'"),
    ({'model.moe.kind': 'peer'}, "must be 'auto' with model.moe.kind='peer'"),
    (
      {'model.moe.router': {'name': 'soft'}, 'allow_leak': True},
      "router 'soft', whose slots are batched matmuls: accepted is 'auto'",
    ),
  ],
)
def test_mixtures_that_run_on_no_kernels_take_none_by_name(changes, sentence):
  with pytest.raises(BadInput, match=sentence):
    check_routing(settings('blocks', **changes))
