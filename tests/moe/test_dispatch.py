"""Dispatch and combine on a case small enough to read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moejax.arrays import Assignment
from moejax.moe.dispatch import combine, dispatch, make_dispatch
from moejax.moe.experts import Experts
from moejax.routers.capacity import rank_within

# Three tokens, two experts, two choices each. Token 1's second choice is dropped (expert 2 of 2).
ASSIGNMENT = Assignment(
  token=jnp.array([0, 0, 1, 1, 2, 2]),
  expert=jnp.array([1, 0, 0, 2, 1, 0]),
  weight=jnp.array([0.5, 0.25, 1.0, 0.0, 2.0, 3.0]),
  chosen=jnp.array([1, 0, 0, 1, 1, 0]),
  num_experts=2,
  groups=3,
)


def test_rows_are_sorted_by_expert_and_dropped_rows_come_last():
  x_td = jnp.array([[10.0], [20.0], [30.0]])
  x_rd, group_sizes_e, sorted_rows = dispatch(x_td, ASSIGNMENT)
  np.testing.assert_array_equal(x_rd[:, 0], [10, 20, 30, 10, 30, 20])
  np.testing.assert_array_equal(group_sizes_e, [3, 2])
  np.testing.assert_array_equal(sorted_rows.expert, [0, 0, 0, 1, 1, 2])
  np.testing.assert_array_equal(sorted_rows.token, [0, 1, 2, 0, 2, 1])


def test_combine_weighs_and_adds_and_no_nan_crosses_over():
  """Expert 0 adds 1, expert 1 doubles; what the dropped row holds is never seen."""
  _, _, rows = dispatch(jnp.zeros((3, 1)), ASSIGNMENT)
  y_rd = jnp.array([[11.0], [21.0], [31.0], [20.0], [60.0], [jnp.nan]])
  y_td = combine(y_rd, rows, num_tokens=3)
  np.testing.assert_allclose(y_td[:, 0], [0.25 * 11 + 0.5 * 20, 1.0 * 21, 3.0 * 31 + 2.0 * 60])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_rank_is_the_number_of_earlier_rows_of_the_same_bin(bins):
  want = [bins[:i].count(value) for i, value in enumerate(bins)]
  np.testing.assert_array_equal(rank_within(jnp.array(bins), 4), want)


@pytest.mark.parametrize('name', ['fused', 'sorted'])
def test_a_dispatch_on_kernels_asked_for_by_name(name):
  """The bodies of XLA run here and agree; those of chips are what is lowered for these."""
  experts = Experts(128, 128, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  run = lambda implementation: jax.jit(
    lambda x_td: make_dispatch(name, implementation)(x_td, ASSIGNMENT, experts)
  )
  x_td = jax.random.normal(jax.random.key(0), (3, 128), jnp.bfloat16)
  usual = np.asarray(run(None)(x_td), np.float32)
  for body in ('blocks', 'reference'):
    found = np.asarray(run(body)(x_td), np.float32)
    np.testing.assert_allclose(found, usual, atol=2**-6 * np.abs(usual).max())
  for body, platform, call in (('gpu', 'cuda', 'mosaic_gpu'), ('tpu', 'tpu', 'tpu_custom_call')):
    program = {
      named: run(named).trace(x_td).lower(lowering_platforms=(platform,)).as_text()
      for named in (None, body)
    }
    assert call in program[body] and call not in program[None]


def test_what_has_no_kernels_takes_none_by_name():
  with pytest.raises(ValueError, match="implementation='gpu' with dispatch='einsum'"):
    make_dispatch('einsum', 'gpu')
  with pytest.raises(ValueError, match="dispatch='sort': accepted are 'einsum', 'fused', 'sorted'"):
    make_dispatch('sort')
