"""Every config is a complete record of its experiment and describes a model that can be laid out."""

import importlib.util
import inspect
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from experiments.build import open_stream
from experiments.check_routing import check_routing
from experiments.errors import BadInput
from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef
from experiments.studies import seeds
from experiments.sweeps import plan
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import param_shardings
from tests.thorough import and_thorough

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'configs'
RECORDS = sorted(p for p in FOLDER.rglob('*.py') if p.stem not in ('__init__', 'common'))
SWEEPS = [p for p in RECORDS if p.parent.name in ('sweeps', 'compare')]
RESULTS = {p.stem if p.parent.name == 'sweeps' else f'compare_{p.stem}' for p in SWEEPS}
CONFIGS = [p for p in RECORDS if p not in SWEEPS]
PARTS = ('Paper:', 'Command:', 'Machine:', 'Time:', 'Expect:', 'Seeds:')
SEEDED = ('tiny', 'tiny_expert_choice', 'tiny_soft_moe_vit')
README = (ROOT / 'README.md').read_text(encoding='utf-8')
EMBEDDED = ('mnist5k', 'wiki6')
# What a model must know of data that is not here. The vocabulary is that of GPT-2, whatever the config's tokenizer.
ABSENT = {
  'c4/en': {'vocab_size': 50_257, 'image_shape': None, 'num_classes': None},
  'imagenet2012': {'vocab_size': None, 'image_shape': (224, 224, 3), 'num_classes': 1000},
}


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def arguments(path):
  """The VARIANTS that a config's get_config(name) accepts, or (None,)."""
  return getattr(load(path), 'VARIANTS', (None,))


def get_config(path, argument):
  return load(path).get_config(*() if argument is None else (argument,))


every_record = pytest.mark.parametrize('path', RECORDS, ids=lambda path: path.stem)
every_config = pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
every_sweep = pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
every_variant = pytest.mark.parametrize(
  ('path', 'argument'),
  [
    pytest.param(path, argument, id=':'.join(filter(None, (path.stem, argument))))
    for path in CONFIGS
    for argument in arguments(path)
  ],
)


@every_record
def test_the_docstring_is_the_experiments_record(path):
  """A sweep may leave machine, time, numbers and seeds to the folder of its results."""
  text = load(path).__doc__
  results = re.search(r'^Results: experiments/results/(\w+)\.$', text, re.MULTILINE)
  elsewhere = path in SWEEPS and results and results[1] in RESULTS
  for part in PARTS[:2] if elsewhere else PARTS:
    assert part in text, part
  assert f'--config configs/{path.relative_to(FOLDER)}' in text


@pytest.mark.parametrize('path', [FOLDER / f'{name}.py' for name in SEEDED], ids=SEEDED)
def test_the_numbers_of_a_record_are_those_of_its_runs(path):
  folder = ROOT / 'experiments' / 'results' / path.stem
  result = json.loads((folder / 'result.json').read_text())
  text = ' '.join(load(path).__doc__.split())
  assert f'Expect: {seeds.measured(result)}' in text
  assert f'Time: {seeds.seconds(result)},' in text
  assert (folder / 'README.md').read_text() == seeds.page(path.relative_to(ROOT), result)
  row = next(line for line in README.splitlines() if f'[configs/{path.name}]' in line)
  assert seeds.seconds(result) in row
  assert any(figure in row for figure in seeds.measured(result).split(', '))


@every_variant
def test_the_settings_are_valid_and_the_parameters_have_a_place(path, argument):
  settings = Settings.from_config(get_config(path, argument))
  check_routing(settings)
  lay_out(settings)


@every_config
def test_an_argument_that_is_not_accepted_is_answered_with_those_that_are(path):
  takes_one = bool(inspect.signature(load(path).get_config).parameters)
  assert takes_one == (arguments(path) != (None,))
  if takes_one:
    with pytest.raises(ValueError, match="'s99'") as error:
      get_config(path, 's99')
    for argument in arguments(path):
      assert f' {argument}' in str(error.value)


@pytest.mark.parametrize('which', and_thorough(['the first and the last'], ['all']))
@every_sweep
def test_every_run_of_a_sweep_is_valid_and_its_parameters_have_a_place(path, which):
  runs, models = plan.load(str(path)), {}
  assert len(runs) > 1
  for run in runs:
    models[json.dumps(asdict(run.settings.model), sort_keys=True)] = run.settings
  different = list(models.values())  # of runs that differ in data, steps or schedule, one
  for settings in different:
    check_routing(settings)
  for settings in different if which == 'all' else different[:: max(len(different) - 1, 1)]:
    lay_out(settings)


@every_variant
def test_data_that_is_not_here_is_asked_for_in_one_sentence(path, argument, tmp_path):
  settings = Settings.from_config(get_config(path, argument))
  if settings.data.name in EMBEDDED:
    assert open_stream(settings, train=True).num_records
    return
  settings = replace(settings, data=replace(settings.data, data_dir=str(tmp_path)))
  with pytest.raises(BadInput) as error:
    open_stream(settings, train=True)
  assert f'`tfds build {settings.data.name} ' in str(error.value)
  assert '\n' not in str(error.value)


def test_the_readme_says_how_large_the_first_model_is():
  params = lay_out(Settings.from_config(get_config(FOLDER / 'tiny.py', None)))
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert f'a byte language model of {count / 1e6:.1f} million parameters' in README


def lay_out(settings):
  """Every parameter and every state of a router has its place on a mesh; no array is made; the parameters' shapes."""
  if settings.data.name in EMBEDDED:
    stream = open_stream(settings, train=True)
  else:
    facts = dict(ABSENT[settings.data.name])
    if settings.model.vocab_size:
      facts['vocab_size'] = min(facts['vocab_size'], settings.model.vocab_size)
    stream = SimpleNamespace(**facts)
  mesh = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, stream, mesh))
  params, routing = jax.eval_shape(definition.init, jax.random.key(0))
  assert jax.tree.leaves(param_shardings(mesh, params))
  param_shardings(mesh, routing)
  return params


def test_a_config_without_a_record_is_found(tmp_path):
  (tmp_path / 'bare.py').write_text('"""Nothing."""\n')
  with pytest.raises(AssertionError, match='Paper:'):
    test_the_docstring_is_the_experiments_record(tmp_path / 'bare.py')
