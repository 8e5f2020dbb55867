"""Sorting rows by expert, and visiting them in blocks."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed, padded


def test_rows_are_sorted_stably_and_dropped_rows_come_last():
  plan = packed.sort_rows(jnp.array([2, 0, 3, 2, 0, 5], jnp.int32), 3)
  assert plan.order.tolist() == [1, 4, 0, 3, 2, 5]
  assert plan.position.tolist() == [2, 0, 4, 3, 1, 5]
  assert plan.starts.tolist() == [0, 2, 2, 4]


@pytest.mark.parametrize(
  ('num_rows', 'num_experts', 'widths'),
  [
    (8192, 16, (512, 128, 32)),
    (8192, 128, (64, 16)),
    (8192, 1, (512, 128, 32)),
    (64, 64, (16,)),
  ],
)
def test_blocks_are_about_as_wide_as_a_group(num_rows, num_experts, widths):
  assert packed.block_widths(num_rows, num_experts) == widths


@jax.jit
def count_visits(start, end):
  """How often a walk in blocks of 64 and 16 rows visits each of 1500 rows."""
  step = lambda first, width, seen: packed.write(
    seen, jax.lax.dynamic_slice_in_dim(seen, first, width) + 1, first
  )
  return packed.walk(start, end, (64, 16), step, jnp.zeros(1500, jnp.int32))


@hypothesis.given(st.integers(0, 700), st.integers(0, 700))
def test_a_walk_visits_each_row_once_and_overruns_by_less_than_a_block(start, size):
  visits = np.asarray(count_visits(jnp.int32(start), jnp.int32(start + size)))
  assert (visits[start : start + size] == 1).all() and not visits[:start].any()
  assert not visits[start + size + 64 :].any()


def test_rows_past_the_end_of_a_block_repeat_the_last_row():
  row, inside = packed.rows_of_block(jnp.int32(5), 4, jnp.int32(7))
  assert row.tolist() == [5, 6, 6, 6] and inside.tolist() == [True, True, False, False]


lay_out = jax.jit(padded.lay_out, static_argnums=1)


@hypothesis.given(st.lists(st.integers(0, 90), min_size=4, max_size=4))
def test_padded_blocks_hold_each_row_once_in_a_block_of_its_expert(sizes):
  """Of 360 rows, those past the last group are in no block."""
  starts = np.cumsum([0, *sizes]).astype(np.int32)
  blocks = jax.tree.map(np.asarray, lay_out(jnp.asarray(starts), 360))
  assert sorted(blocks.row[blocks.inside]) == list(range(sum(sizes)))
  owner = np.repeat(np.arange(4), sizes)
  owners = np.broadcast_to(blocks.expert[:, None], blocks.row.shape)
  np.testing.assert_array_equal(owners[blocks.inside], owner[blocks.row[blocks.inside]])
  rows = blocks.row.reshape(-1)[blocks.slot[: sum(sizes)]]
  np.testing.assert_array_equal(rows, np.arange(sum(sizes)))
