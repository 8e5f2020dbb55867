"""Sweep files of runs that take a second each."""

import pytest

BASE = """
from configs import common
from configs.sweeps import grid

def get_base():
  config = common.get_config()
  config.update({'batch_size': 8, 'steps': 3})
  config.data.sequence_length = 16
  config.model.update({'d_model': 8, 'num_layers': 1, 'num_heads': 2, 'd_ff': 16})
  config.eval.update({'every': 0, 'batches': 1})
  config.checkpoint.every = 0
  config.log.update({'tensorboard': False, 'report': False, 'every': 1})
  return config

def get_runs():
  return """


@pytest.fixture
def make_sweep(tmp_path):
  """`make_sweep("grid({'seed': (0, 1)})")`: the path of a sweep file with these runs."""

  def make(runs: str):
    path = tmp_path / 'sweep.py'
    path.write_text(f'{BASE}{runs}\n')
    return path

  return make
