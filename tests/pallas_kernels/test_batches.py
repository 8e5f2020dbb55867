"""Which rows of the experts are taken together."""

import jax.numpy as jnp
import pytest

from pallas_kernels.batches import batch


@pytest.mark.parametrize(
  ('sizes', 'taken'),
  [
    ((130, 126, 128, 128), (130, 126, 128, 128)),
    ((90, 200, 100, 122), (90, 160, 100, 122)),
    ((160, 160, 0, 0), (160, 160, 0, 0)),  # half full
    ((160, 159, 0, 0), (0, 0, 0, 0)),  # less
    ((0, 266, 130, 30), (0, 160, 130, 30)),  # a quarter is left
    ((0, 270, 130, 30), (0, 0, 0, 0)),  # more
  ],
)
def test_a_batch_has_the_first_rows_of_all_experts_unless_loads_are_uneven(sizes, taken):
  starts = jnp.cumsum(jnp.array([0, *sizes], jnp.int32), dtype=jnp.int32)
  found = batch(starts, 512)
  assert (found.width, found.experts) == (160, 4)
  assert found.taken_e.tolist() == list(taken) and bool(found.worth) == (sum(taken) > 0)


def test_experts_of_too_few_rows_or_of_enough_have_no_batch():
  starts = jnp.zeros(65, jnp.int32)
  assert batch(starts, 64 * 8) is None and batch(starts, 64 * 129) is None
  assert batch(starts, 64 * 20) is not None


def test_a_batch_takes_a_divisor_of_the_experts():
  starts = lambda experts: jnp.zeros(experts + 1, jnp.int32)
  assert batch(starts(60), 60 * 100).experts == 6  # of 128 rows each; eight would fit
  assert batch(starts(11), 11 * 100) is None
