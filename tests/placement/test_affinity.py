import itertools

import numpy as np
import pytest

from moejax.placement import (
  affinity_placement,
  crossings,
  identity_placement,
  solve_exactly,
  solve_locally,
)


def planted(rng, layers, experts, devices, stray=0.0):
  """Tokens that stay within hidden blocks of experts, but for a share that strays; and the blocks."""
  block = rng.permuted(identity_placement(layers, experts, devices), axis=1)
  same = block[:-1, :, None] == block[1:, None, :]
  return np.where(same, rng.integers(5, 20, same.shape), stray), block


def best_by_trying(weights, devices):
  """The fewest crossings of all placements, by all of them."""
  layers, experts = weights.shape[0] + 1, weights.shape[1]
  ways = sorted(set(itertools.permutations(identity_placement(1, experts, devices)[0])))
  return min(crossings(weights, np.array(one)) for one in itertools.product(ways, repeat=layers))


def test_crossings_are_counted_token_by_token(rng):
  weights = rng.integers(0, 9, (2, 4, 4)).astype(float)
  placement = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 0]])
  apart = sum(
    weights[n, i, j] for n, i, j in np.ndindex(2, 4, 4) if placement[n, i] != placement[n + 1, j]
  )
  assert crossings(weights, placement) == apart / weights.sum()
  assert crossings(weights * 0, placement) == 0


def test_the_integer_program_finds_the_best_of_all_placements(rng):
  weights = rng.integers(0, 9, (2, 4, 4)).astype(float)
  placement = solve_exactly(weights, 2)
  assert (np.sort(placement, axis=1) == [0, 0, 1, 1]).all()
  assert crossings(weights, placement) == pytest.approx(best_by_trying(weights, 2))


def test_the_local_search_is_as_good_on_small_problems(rng):
  for _ in range(3):
    weights = rng.integers(0, 9, (2, 4, 4)).astype(float)
    found = crossings(weights, solve_locally(weights, 2))
    assert found == pytest.approx(best_by_trying(weights, 2))


@pytest.mark.parametrize(('layers', 'experts', 'devices'), [(3, 6, 3), (8, 64, 8)])
def test_planted_blocks_are_found_again(layers, experts, devices, rng):
  weights, block = planted(rng, layers, experts, devices)
  assert crossings(weights, block) == 0
  assert crossings(weights, identity_placement(layers, experts, devices)) > 0.5
  placement = affinity_placement(weights, devices)
  assert crossings(weights, placement) == 0
  counts = np.apply_along_axis(np.bincount, 1, placement, minlength=devices)
  assert (counts == experts // devices).all()


def test_other_names_of_experts_change_nothing(rng):
  """Relabelling the experts of a layer relabels the placement."""
  weights = rng.integers(0, 9, (2, 4, 4)).astype(float)
  order = rng.permuted(np.tile(np.arange(4), (3, 1)), axis=1)
  renamed = np.stack([weights[n][order[n]][:, order[n + 1]] for n in range(2)])
  fewest = crossings(weights, solve_exactly(weights, 2))
  assert crossings(renamed, solve_exactly(renamed, 2)) == pytest.approx(fewest)


def test_affinity_is_never_worse_than_the_order_that_is_there(rng):
  weights = np.ones((3, 8, 8)) + rng.random((3, 8, 8)) / 100
  before = crossings(weights, identity_placement(4, 8, 4))
  assert crossings(weights, affinity_placement(weights, 4, method='local')) <= before
  assert affinity_placement(weights, 1).max() == 0


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [((3,), 'num_experts=4 does not divide over num_devices=3'), ((2, 'greedy'), "method='greedy'")],
)
def test_what_cannot_be_placed_is_refused(arguments, message):
  with pytest.raises(ValueError, match=message):
    affinity_placement(np.ones((1, 4, 4)), arguments[0], method=(*arguments, 'auto')[1])
