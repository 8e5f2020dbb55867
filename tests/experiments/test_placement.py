import json
import re
from pathlib import Path

import numpy as np
import pytest

from experiments import placement
from experiments.errors import BadInput


def routed(rng, batches=6, tokens=200, layers=4, experts=8, stray=0.1):
  """Tokens that stay in one of four hidden pairs of experts in each layer, but for some that stray."""
  pair = rng.integers(0, 4, (batches, tokens, 1, 1))
  names = rng.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
  inside = pair * 2 + rng.integers(0, 2, (batches, tokens, layers, 2))
  inside = np.where(
    rng.random(inside.shape) < stray, rng.integers(0, experts, inside.shape), inside
  )
  return names[np.arange(layers)[None, None, :, None], inside]


def test_a_placement_found_on_some_tokens_serves_others(rng):
  found = placement.judged(routed(rng), 8, 4)
  assert found['crossings_after'] < 0.3 < 0.6 < found['crossings_before']
  assert found['crossings_by_chance'] == 0.75
  assert found['pairs_per_token'] == 3 * 4


def test_copies_of_a_hot_expert_balance_other_tokens_too(rng):
  choices = np.where(rng.random((4, 300, 2, 1)) < 0.5, 0, rng.integers(0, 8, (4, 300, 2, 1)))
  found = placement.judged(choices, 8, 4, slots=3)
  assert found['imbalance_before'] > 2
  assert found['imbalance_after'] < 1.3


def test_one_batch_is_not_enough(rng):
  with pytest.raises(ValueError, match='--batches=1 is not accepted'):
    placement.judged(routed(rng, batches=1), 8, 4)


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
  config = str(placement.__file__).replace('experiments/placement.py', 'configs/tiny.py')
  with pytest.raises(BadInput, match='has no checkpoint of a model to place'):
    placement.main(['placement', '--config', config, '--workdir', str(tmp_path)])


@pytest.mark.parametrize(
  ('given', 'least'),
  [('devices=two', 2), ('devices=4,1', 2), ('batches=1', 2), ('batches=-1', 2), ('slots=-1', 0)],
)
def test_numbers_that_nothing_can_be_placed_with_are_refused(given, least, tmp_path):
  config = str(placement.__file__).replace('experiments/placement.py', 'configs/tiny.py')
  flag, _, value = given.rpartition('=')
  wrong = re.escape(f'--{flag}={value.rpartition(",")[2]} is not accepted: accepted are integers')
  with pytest.raises(BadInput, match=f'^{wrong} from {least}$'):
    placement.main(['', '--config', config, '--workdir', str(tmp_path), f'--{given}'])


def test_devices_that_experts_do_not_divide_over_are_refused_before_any_work(tmp_path):
  config = str(placement.__file__).replace('experiments/placement.py', 'configs/tiny.py')
  with pytest.raises(BadInput, match='^--devices=3 does not divide the 8 experts of a layer$'):
    placement.main(['', '--config', config, '--workdir', str(tmp_path), '--devices=2,3'])


def test_of_an_odd_number_of_batches_the_last_is_left_out(rng):
  choices = routed(rng, batches=5)
  assert placement.judged(choices, 8, 4) == placement.judged(choices[:4], 8, 4)


def test_the_page_is_that_of_its_numbers():
  folder = Path(placement.__file__).parent / 'results' / 'placement'
  result = json.loads((folder / 'result.json').read_text())
  assert (folder / 'README.md').read_text() == placement.page(result)
  assert [row['devices'] for row in result['rows']] == [2, 4, 8]


def test_the_report_is_json(rng):
  assert json.loads(json.dumps(placement.judged(routed(rng, batches=2), 8, 2)))['devices'] == 2
