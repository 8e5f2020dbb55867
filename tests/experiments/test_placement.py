import json
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


def test_devices_that_are_no_numbers_are_refused():
  with pytest.raises(BadInput, match='--devices=two is not accepted'):
    placement._positive('two')


def test_the_page_is_that_of_its_numbers():
  folder = Path(placement.__file__).parent / 'results' / 'placement'
  result = json.loads((folder / 'result.json').read_text())
  assert (folder / 'README.md').read_text() == placement.page(result)
  assert [row['devices'] for row in result['rows']] == [2, 4, 8]


def test_the_report_is_json(rng):
  assert json.loads(json.dumps(placement.judged(routed(rng, batches=2), 8, 2)))['devices'] == 2
