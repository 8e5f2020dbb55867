"""Which runs a sweep file has, and which files are refused in one sentence."""

import textwrap

import pytest

from configs.sweeps import grid
from experiments.errors import BadInput
from experiments.sweeps import plan

BASE = """
from configs import common
from configs.sweeps import grid

def get_base():
  config = common.get_config()
  config.steps = 10
  return config

"""


@pytest.fixture
def sweep(tmp_path):
  def write(runs, base=BASE):
    file = tmp_path / 'sweep.py'
    file.write_text(base + f'def get_runs():\n  return {textwrap.dedent(runs)}\n')
    return str(file)

  return write


def test_a_grid_is_every_combination_with_the_last_axis_fastest():
  assert grid({'a': (1, 2), 'b': ('x', 'y')}) == [
    {'a': 1, 'b': 'x'},
    {'a': 1, 'b': 'y'},
    {'a': 2, 'b': 'x'},
    {'a': 2, 'b': 'y'},
  ]


def test_a_run_is_the_base_with_its_changes(sweep):
  runs = plan.load(sweep("grid({'model.moe.granularity': (1, 2), 'seed': (0, 1)})"))
  assert [run.name for run in runs] == [
    'granularity=1 seed=0',
    'granularity=1 seed=1',
    'granularity=2 seed=0',
    'granularity=2 seed=1',
  ]
  assert runs[3].settings.model.moe.granularity == 2
  assert runs[3].config['steps'] == 10
  assert len({run.key for run in runs}) == 4


def test_a_router_is_replaced_as_a_whole(sweep):
  (run,) = plan.load(
    sweep("[{'model.moe.router': {'name': 'expert_choice', 'group': 'position'}}]")
  )
  assert run.settings.model.moe.router == {'name': 'expert_choice', 'group': 'position'}
  assert run.name == 'router=expert_choice(group=position)'


def test_the_key_is_of_what_the_config_says_and_not_of_where_it_stands(sweep):
  first = plan.load(sweep("[{'seed': 1, 'steps': 5}]"))[0]
  again = plan.load(sweep("[{'steps': 5, 'seed': 1}]"))[0]
  other = plan.load(sweep("[{'steps': 6, 'seed': 1}]"))[0]
  assert first.key == again.key != other.key


def test_an_override_wins_in_every_run(sweep):
  runs = plan.load(sweep("[{'seed': 1, 'steps': 5}, {'seed': 2}]"), ['--config.steps=3'])
  assert [run.settings.steps for run in runs] == [3, 3]


@pytest.mark.parametrize(
  'runs, sentence',
  [
    ('grid({"seed": ()})', 'get_runs() returned no run: an axis of the grid is empty'),
    ('{"seed": 1}', 'get_runs() must return a list of dicts'),
    ('[{"sed": 1}]', 'run 0: sed is not a setting: did you mean seed?'),
    ('[{"seed": 1}, {"steps": 0}]', 'run 1: steps=0 is not accepted'),
    ('[{"seed": 1}, {"seed": 1}]', "two runs have one config, 'seed=1' and 'seed=1'"),
    ('[{"seed": 1 / 0}]', 'ZeroDivisionError'),
  ],
)
def test_a_sweep_that_cannot_be_run_is_refused_in_one_sentence(sweep, runs, sentence):
  with pytest.raises(BadInput) as error:
    plan.load(sweep(runs))
  assert sentence in str(error.value)
  assert '\n' not in str(error.value)


def test_a_config_is_no_sweep():
  with pytest.raises(
    BadInput, match=r'configs/tiny.py is not a sweep: it has no function get_base'
  ):
    plan.load('configs/tiny.py')
