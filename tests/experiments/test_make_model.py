"""From settings and a mesh to a model: what the platform decides."""

import types

import jax
import pytest
from flax import nnx

from configs import common
from experiments.make_model import model_maker
from experiments.settings import Settings
from moejax.mesh.make import make_mesh
from moejax.transformer import Attention

STREAM = types.SimpleNamespace(vocab_size=16, image_shape=None, num_classes=None)


def on_accelerators(mesh):
  """What `model_maker` sees of a mesh."""
  device = types.SimpleNamespace(platform='tpu')
  return types.SimpleNamespace(devices=types.SimpleNamespace(flat=[device]), size=mesh.size)


@pytest.mark.parametrize(
  ('kind', 'cpu', 'implementation'),
  [('decoder', True, 'pieces'), ('encoder', True, None), ('decoder', False, None)],
)
def test_causal_attention_is_in_pieces_on_cpus(kind, cpu, implementation):
  config = common.get_config()
  config.model.update({'kind': kind, 'd_model': 8, 'num_heads': 2, 'd_ff': 24})
  config.model.moe.layers = 'none'
  config.data.objective = 'masked' if kind == 'encoder' else 'causal'
  mesh = make_mesh(devices=jax.devices()[:1])
  maker = model_maker(Settings.from_config(config), STREAM, mesh if cpu else on_accelerators(mesh))
  model = nnx.eval_shape(lambda: maker(nnx.Rngs(0)))
  found = [part.implementation for _, part in nnx.iter_graph(model) if isinstance(part, Attention)]
  assert found and {*found} == {implementation}
