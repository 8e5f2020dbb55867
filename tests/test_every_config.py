"""Every config is a complete record of its experiment and describes a model that can be laid out."""

import importlib.util
from pathlib import Path

import jax
import pytest

from experiments.build import check_routing, model_maker, open_stream
from experiments.settings import Settings
from experiments.state import ModelDef
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import param_shardings

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(
  p for p in (ROOT / 'configs').rglob('*.py') if p.stem not in ('__init__', 'common')
)
PARTS = ('Paper:', 'Command:', 'Machine:', 'Time:', 'Expect:', 'Seeds:')

every_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@every_config
def test_the_docstring_is_the_experiments_record(path):
  text = load(path).__doc__
  for part in PARTS:
    assert part in text, part
  assert f'--config configs/{path.relative_to(ROOT / "configs")}' in text


@every_config
def test_the_settings_are_valid_and_the_parameters_have_a_place(path):
  settings = Settings.from_config(load(path).get_config())
  check_routing(settings)
  mesh = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, open_stream(settings, train=True), mesh))
  params, routing = jax.eval_shape(definition.init, jax.random.key(0))
  assert jax.tree.leaves(param_shardings(mesh, params))
  param_shardings(mesh, routing)


def test_a_config_without_a_record_is_found(tmp_path):
  (tmp_path / 'bare.py').write_text('"""Nothing."""\n')
  with pytest.raises(AssertionError, match='Paper:'):
    test_the_docstring_is_the_experiments_record(tmp_path / 'bare.py')
