"""Every setting is read from a config, and every mistake is one sentence with key, value and what is accepted."""

import dataclasses
import json
import re
import typing

import pytest

from configs import common
from experiments.check_routing import check_routing
from experiments.errors import BadInput
from experiments.settings import Settings, moe_layers


def _changed(path, value):
  config = common.get_config().to_dict()
  *sections, last = path.split('.')
  section = config
  for name in sections:
    section = section[name]
  section[last] = value
  return config


def _keys(section, prefix=''):
  keys = set()
  for name, kind in typing.get_type_hints(section).items():
    nested = dataclasses.is_dataclass(kind)
    keys |= _keys(kind, f'{prefix}{name}.') if nested else {prefix + name}
  return keys


def _config_keys(config, prefix=''):
  keys = set()
  for name, value in config.items():
    nested = isinstance(value, dict) and f'{prefix}{name}' not in (
      'compiler',
      'model.moe.router',
      'model.moe.losses',
      'model.moe.zero_experts',
      'model.moe.momentum',
      'model.moe.exchange_options',
      'model.moe.options',
      'model.heads.options',
      'model.heads.router',
      'model.heads.losses',
      'optim.decay_of',
    )
    keys |= _config_keys(value, f'{prefix}{name}.') if nested else {prefix + name}
  return keys


def test_the_default_config_and_the_dataclasses_have_the_same_keys():
  assert _config_keys(common.get_config().to_dict()) == _keys(Settings)


def test_no_dataclass_has_a_default():
  def check(section):
    for field in dataclasses.fields(section):
      assert field.default is dataclasses.MISSING, field
      assert field.default_factory is dataclasses.MISSING, field
    for kind in typing.get_type_hints(section).values():
      if dataclasses.is_dataclass(kind):
        check(kind)

  check(Settings)


def test_settings_of_a_config_dict_of_a_dict_and_of_its_json_are_equal():
  config = common.get_config()
  config.model.moe.router = {'name': 'top_k', 'k': 2, 'widths': (4, 5)}
  settings = Settings.from_config(config)
  assert settings == Settings.from_config(config.to_dict())
  assert settings == Settings.from_config(json.loads(json.dumps(config.to_dict())))
  assert settings.model.moe.router == {'name': 'top_k', 'k': 2, 'widths': (4, 5)}


def test_zero_stands_for_the_usual_size_and_is_resolved():
  model = Settings.from_config(common.get_config()).model
  assert (model.num_kv_heads, model.head_dim, model.moe.d_ff) == (4, 32, 512)


def test_an_int_is_accepted_for_a_float_and_becomes_one():
  rate = Settings.from_config(_changed('optim.weight_decay', 1)).optim.weight_decay
  assert type(rate) is float and rate == 1.0


@pytest.mark.parametrize(
  'path, value, sentence',
  [
    ('steps', 0, 'steps=0 is not accepted: it must be between 1 and 2147483647'),
    ('steps', True, 'steps=True is not accepted: it must be an integer'),
    ('steps', None, 'steps=None is not accepted: it must be an integer'),
    ('steps', 10.0, 'steps=10.0 is not accepted: it must be an integer'),
    ('seed', -1, 'seed=-1 is not accepted: it must be between 0 and 4294967295'),
    ('profile', 1, 'profile=1 is not accepted: it must be True or False'),
    ('data.name', '', "data.name='' is not accepted: it must be a name"),
    ('data.mask_rate', 1.5, 'data.mask_rate=1.5 is not accepted: it must be between 0 and 1'),
    (
      'optim.learning_rate',
      float('nan'),
      'optim.learning_rate=nan is not accepted: it must be finite',
    ),
    (
      'optim.learning_rate',
      float('inf'),
      'optim.learning_rate=inf is not accepted: it must be finite',
    ),
    ('optim.learning_rate', 0.0, 'optim.learning_rate=0.0 is not accepted: it must be more than 0'),
    (
      'optim.learning_rate',
      '1e-3',
      "optim.learning_rate='1e-3' is not accepted: it must be a number",
    ),
    ('optim.b2', 1.0, 'optim.b2=1.0 is not accepted: it must be at least 0 and less than 1'),
    ('optim.clip_norm', -1.0, 'optim.clip_norm=-1.0 is not accepted: it must be 0 or more'),
    (
      'optim.schedule',
      'cosin',
      "optim.schedule='cosin' is not accepted: it must be one of cosine, trapezoid, rsqrt, constant",
    ),
    ('checkpoint.keep', 1, 'checkpoint.keep=1 is not accepted: it must be at least 2'),
    (
      'mesh.data',
      0,
      'mesh.data=0 is not accepted: it must be at least 1, or -1 for all devices that are left',
    ),
    (
      'mesh.fsdp',
      -1,
      'only one mesh axis can be -1, the devices that are left, and here data, fsdp are',
    ),
    ('mesh.expert', 3, 'num_experts=8 does not divide over mesh axis expert=3'),
    ('model', 3, 'model=3 is not accepted: it must be a section of settings'),
    (
      'model.num_heads',
      3,
      'model.d_model=128 is not accepted: it must be a multiple of model.num_heads=3',
    ),
    (
      'model.num_kv_heads',
      3,
      'model.num_heads=4 is not accepted: it must be a multiple of model.num_kv_heads=3',
    ),
    (
      'model.head_dim',
      7,
      'model.head_dim=7 is not accepted: it must be even: rotary positions turn pairs',
    ),
    (
      'model.num_heads',
      128,
      'model.num_heads=128 is not accepted: it must be such that model.d_model=128 over it is even: '
      'rotary positions turn pairs',
    ),
    (
      'model.attention',
      'latent',
      "model.qk_norm=True is not accepted: it must be False with model.attention='latent', which norms its latents",
    ),
    ('model.rope_theta', 0.0, 'model.rope_theta=0.0 is not accepted: it must be more than 0'),
    ('microbatches', 5, 'batch_size=32 is not accepted: it must be a multiple of microbatches=5'),
    ('microbatches', 0, 'microbatches=0 is not accepted: it must be at least 1'),
    (
      'model.moe.granularity',
      3,
      'model.d_ff=512 is not accepted: it must be a multiple of model.moe.granularity=3',
    ),
    (
      'model.moe.layers',
      'half',
      "model.moe.layers='half' is not accepted: it must be 'none', 'all', 'every_2', 'last_half', 'last_2' "
      "or layer indices such as '4,5'",
    ),
    (
      'model.moe.layers',
      '3,4',
      "model.moe.layers='3,4' is not accepted: it must be distinct layers of the 4 there are (model.num_layers)",
    ),
    (
      'model.moe.layers',
      '1,1',
      "model.moe.layers='1,1' is not accepted: it must be distinct layers of the 4 there are (model.num_layers)",
    ),
    (
      'model.moe.router.k',
      9,
      'model.moe.router.k=9 is not accepted: it must be an integer from 1 to model.moe.num_experts=8',
    ),
    (
      'model.moe.router.name',
      '',
      "model.moe.router.name='' is not accepted: it must be the name of a router",
    ),
    (
      'model.moe.router.capacity_factor',
      -1.0,
      'model.moe.router.capacity_factor=-1.0 is not accepted: it must be a number more than 0, or None',
    ),
    (
      'model.moe.router.x',
      {'y': 1},
      'model.moe.router.x=<dict> is not accepted: it must be a number, a bool, a str, None or a tuple of these',
    ),
    (
      'model.moe.losses.balance',
      True,
      'model.moe.losses.balance=True is not accepted: it must be a number',
    ),
    (
      'model.moe.losses.balance',
      -0.1,
      'model.moe.losses.balance=-0.1 is not accepted: it must be 0 or more',
    ),
    (
      'data.objective',
      'masked',
      "data.objective='masked' is not accepted: it must be causal for model.kind='decoder'",
    ),
    ('stepz', 3, 'stepz is not a setting: did you mean steps?'),
    ('model.num_layer', 3, 'model.num_layer is not a setting: did you mean model.num_layers?'),
    (
      'log.colour',
      3,
      'log.colour is not a setting: accepted are log.every, log.tensorboard, log.report',
    ),
  ],
)
def test_a_value_that_cannot_be_run_is_refused_in_one_sentence(path, value, sentence):
  with pytest.raises(BadInput) as error:
    Settings.from_config(_changed(path, value))
  assert str(error.value) == sentence
  assert error.value.exit_code == 2


def test_a_missing_key_is_named():
  config = common.get_config().to_dict()
  del config['optim']['b1']
  with pytest.raises(BadInput, match=r'^optim\.b1 is missing: configs/common\.py has the default'):
    Settings.from_config(config)


def test_something_else_than_a_config_is_refused():
  with pytest.raises(BadInput, match='a config must be a ConfigDict or a dict, not a list'):
    Settings.from_config([])


def test_a_dense_model_is_not_asked_for_sensible_experts():
  config = _changed('model.moe.layers', 'none')
  config['model']['moe']['router'] = {'name': 'top_k', 'k': 99}
  assert Settings.from_config(config).model.moe_layers == ()


@pytest.mark.parametrize(
  'pattern, layers',
  [
    ('none', ()),
    ('all', (0, 1, 2, 3, 4)),
    ('every_2', (1, 3)),
    ('last_half', (3, 4)),
    ('last_1', (4,)),
    ('4,0', (0, 4)),
  ],
)
def test_moe_layers_of_five(pattern, layers):
  assert moe_layers(pattern, 5) == layers


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({}, 'model.latent.kv_rank=0 is not accepted: it must be at least 1'),
    ({'latent.kv_rank': 8}, 'model.latent.rotary_dim=0 is not accepted: it must be even'),
    ({'latent.kv_rank': 8, 'latent.rotary_dim': 3}, 'model.latent.rotary_dim=3 is not accepted'),
    (
      {'num_kv_heads': 2},
      'model.num_kv_heads=2 is not accepted: it must be 0 or model.num_heads=4',
    ),
    ({'kind': 'vit'}, "model.attention='latent' is not accepted: it must be 'grouped'"),
  ],
)
def test_latent_attention_needs_its_sizes(change, message):
  config = common.get_config()
  config.model.attention, config.model.qk_norm = 'latent', False
  config.update_from_flattened_dict({f'model.{key}': value for key, value in change.items()})
  with pytest.raises(BadInput, match=re.escape(message)):
    Settings.from_config(config)


def test_a_router_may_be_told_to_drop_nothing():
  """Presets have a capacity unless the config says None; JSON's null says it too."""
  config = common.get_config()
  config.model.moe.router = {'name': 'switch', 'capacity_factor': None}
  settings = Settings.from_config(config)
  assert settings.model.moe.router['capacity_factor'] is None
  assert Settings.from_config(json.loads(json.dumps(config.to_dict()))) == settings
  check_routing(settings)


def test_choices_of_experts_that_do_nothing_count_beside_the_others():
  """Two experts and four null ones, four choices; three choices among two experts and a copy."""
  config = common.get_config()
  config.model.moe.num_experts = 2
  config.model.moe.router = {'name': 'ada_moe', 'k': 4, 'nulls': 4}
  check_routing(Settings.from_config(config))
  config.model.moe.router = {'name': 'top_k', 'k': 3}
  config.model.moe.zero_experts = {'copy': 1}
  check_routing(Settings.from_config(config))


@pytest.mark.parametrize(
  ('key', 'value', 'accepted'),
  [
    ('num_kv_heads', 2, '0'),
    ('head_dim', 8, '0'),
    ('qk_norm_scope', 'all', "'head'"),
    ('vocab_size', 512, '0'),
  ],
)
def test_what_an_image_model_does_not_have_is_refused(key, value, accepted):
  config = common.get_config()
  config.data.objective, config.model.kind = 'classify', 'vit'
  config.model[key] = value
  with pytest.raises(BadInput) as error:
    Settings.from_config(config)
  sentence = f"model.{key}={value!r} is not accepted: it must be {accepted} for model.kind='vit'"
  assert str(error.value) == sentence
