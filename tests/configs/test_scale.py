"""The scale configs against what their makers publish. No array of these sizes is made."""

import functools
import importlib
import inspect
import re
from types import SimpleNamespace

import jax
import pytest

from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef
from moejax.mesh.make import make_mesh
from moejax.transformer.flops import count_params

# Parameters, those of the published weights where these were counted, and the active ones with the last digit that is
# printed.
PUBLISHED = {
  # total_size of model.safetensors.index.json, mistralai/Mixtral-8x7B-v0.1, over 2 bytes; 'Mixtral of experts'
  'mixtral_8x7b': (46_702_792_704, 12.9e9, 0.05e9),
  # headers of the three shards of allenai/OLMoE-1B-7B-0924; its model card
  'olmoe_1b_7b': (6_919_161_856, 1.3e9, 0.05e9),
  # headers of the 163 shards of deepseek-ai/DeepSeek-V3 without the module for a second token, and without the biases
  # below; its README_WEIGHTS.md: 671B and 36.6B
  'deepseek_v3_671b': (671_026_404_352, 36.6e9, 0.05e9),
  # total_size of model.safetensors.index.json, Qwen/Qwen3-235B-A22B, over 2 bytes; its model card
  'qwen3_235b': (235_093_634_560, 22e9, 0.5e9),
  # headers of the 61 shards of moonshotai/Kimi-K2-Instruct without the biases below; 'Kimi K2' (arXiv 2507.20534)
  'kimi_1t': (1_026_408_209_408, 32.6e9, 0.3e9),
  # what config.json makes, no count of the weights was found: unsourced; 'Every FLOP counts' (arXiv 2503.05139) has
  # 290B and 28.8B
  'ling_300b': (290_602_910_976, 28.8e9, 0.25e9),
}


def module(name):
  return importlib.import_module(f'configs.scale.{name}')


@functools.cache
def counts(name):
  settings = Settings.from_config(module(name).get_config())
  stream = SimpleNamespace(vocab_size=1, image_shape=None, num_classes=None)
  mesh = make_mesh(devices=jax.devices()[:1])
  params, routing = jax.eval_shape(
    ModelDef(model_maker(settings, stream, mesh)).init, jax.random.key(0)
  )
  return settings.model, count_params(params), sum(leaf.size for leaf in jax.tree.leaves(routing))


def active(name):
  """Of a token: all but the experts it does not choose; of DeepSeek-V3, as its README counts, without the table."""
  model, parts, _ = counts(name)
  experts = parts['moe/experts']
  own = parts['total'] - experts + experts * model.moe.router['k'] // model.moe.num_experts
  return own - parts['embed'] if name == 'deepseek_v3_671b' else own


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_scale_config_has_the_published_parameters(name):
  total, working, digit = PUBLISHED[name]
  assert counts(name)[1]['total'] == total
  assert abs(active(name) - working) < digit


@pytest.mark.parametrize(
  ('name', 'mixtures', 'experts', 'checkpoint'),
  [
    ('deepseek_v3_671b', 58, 256, 671_026_419_200),
    ('kimi_1t', 60, 384, 1_026_408_232_448),
  ],
)
def test_the_balancing_biases_complete_a_checkpoint(name, mixtures, experts, checkpoint):
  """The weights of these list a number for each expert of a mixture more, e_score_correction_bias."""
  _, parts, biases = counts(name)
  assert biases == mixtures * experts
  assert parts['total'] + biases == checkpoint


def test_a_total_without_a_count_of_the_weights_rounds_to_what_is_printed():
  assert int(counts('ling_300b')[1]['total'] / 1e9) == 290


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_docstring_of_a_scale_config_has_its_counts(name):
  text = ' '.join(inspect.getdoc(module(name)).split())
  said = re.search(r'Parameters: ([\d,]+) in all, ([\d.]+) billion', text)
  assert int(said[1].replace(',', '')) == counts(name)[1]['total']
  assert float(said[2]) == pytest.approx(active(name) / 1e9, abs=0.05)


def test_only_the_first_layers_of_deepseek_v3_are_dense():
  model, parts, _ = counts('deepseek_v3_671b')
  assert model.moe_layers == tuple(range(3, 61))
  assert parts['ffn'] == 3 * 3 * 7168 * 18432
