"""Settings that came later: their usual values are those of configs/common.py, and hashes of runs leave them out."""

import json

from configs import common
from experiments import workdir
from experiments.later import LATER, with_later, without_later
from experiments.settings import Settings
from experiments.sweeps import plan

SWEEP = """
from configs import common

def get_base():
  return common.get_config()

def get_runs():
  return [{'seed': 0}, {'seed': 0, 'optim.name': 'adafactor'}]
"""


def test_the_values_are_the_defaults_and_old_configs_are_read_as_if_they_had_them():
  config = common.get_config().to_dict()
  old = without_later(config)
  for dotted, usual in LATER.items():
    *sections, key = dotted.split('.')
    new_section, old_section = config, old
    for section in sections:
      new_section, old_section = new_section[section], old_section[section]
    assert new_section[key] == usual
    assert key not in old_section
  assert with_later(old) == config
  assert Settings.from_config(old) == Settings.from_config(config)


def test_a_value_that_is_not_the_usual_one_stays():
  config = common.get_config()
  config.optim.name = 'adafactor'
  config.optim.decay_of = {'head/weight': 3.0}
  kept = without_later(config.to_dict())
  assert kept['optim']['name'] == 'adafactor'
  assert kept['optim']['decay_of'] == {'head/weight': 3.0}
  assert 'adafactor' not in kept['optim']


def test_the_hash_of_a_run_is_of_what_it_was_before_them(tmp_path):
  file = tmp_path / 'sweep.py'
  file.write_text(SWEEP)
  usual, other = plan.load(str(file))
  text = json.dumps(without_later(common.get_config().to_dict()), sort_keys=True)
  assert usual.key == plan.digest(text)
  assert other.key != usual.key
  assert usual.config['optim']['name'] == 'adamw'


def test_a_run_from_before_goes_on(tmp_path):
  config = common.get_config().to_dict()
  workdir.config_path(tmp_path).write_text(json.dumps(without_later(config)))
  with workdir.opened(tmp_path, config):
    workdir.write_config(tmp_path, config)
    assert workdir.read_json(workdir.config_path(tmp_path)) == config
