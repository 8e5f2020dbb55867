import numpy as np
import pytest

from moejax.placement import replicate


def test_copies_of_the_hot_expert_make_loads_equal():
  """One expert has half of all rows: a copy on each of four devices shares it."""
  load = np.array([12.0, 2, 2, 2, 2, 2, 2])
  plain = replicate(load, 4, 2)
  shared = replicate(load, 4, 3)
  assert shared.imbalance < plain.imbalance
  assert np.bincount(shared.expert.ravel(), minlength=7)[0] == 4
  assert (np.sort(np.unique(shared.expert)) == np.arange(7)).all()
  assert shared.load.sum() == pytest.approx(load.sum())


def test_without_room_for_copies_experts_are_packed_by_load():
  result = replicate(np.array([8.0, 7, 6, 5, 4, 3, 2, 1]), 4, 2)
  assert (result.load == 9).all()
  assert sorted(result.expert.ravel()) == list(range(8))
  assert result.imbalance == 1


def test_the_load_of_a_device_is_that_of_its_slots(rng):
  load = rng.integers(1, 100, 16).astype(float)
  result = replicate(load, 4, 6)
  copies = np.bincount(result.expert.ravel(), minlength=16)
  for device in range(4):
    assert result.load[device] == pytest.approx(
      sum(load[e] / copies[e] for e in result.expert[device])
    )
    assert len(set(result.expert[device])) == 6  # no two copies of one expert


@pytest.mark.parametrize('slots', [1, 5])
def test_slots_that_do_not_hold_the_experts_or_too_many_are_refused(slots):
  with pytest.raises(ValueError, match=f'slots={slots} on num_devices=2 for num_experts=4'):
    replicate(np.ones(4), 2, slots)


def test_experts_without_load_are_balanced():
  assert replicate(np.zeros(4), 2, 2).imbalance == 1
