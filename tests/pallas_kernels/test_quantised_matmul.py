"""Every body of quantised_matmul against rows and columns written out in NumPy."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Quantised, Unsupported, quantise, quantised_matmul
from pallas_kernels.grouped_matmul.cases import CASES
from tests.pallas_kernels.interpreted import interpreted

BODIES = ('blocks', 'cpu', 'tpu')
KINDS = ('int8', 'float8_e4m3fn')
matmul = jax.jit(quantised_matmul, static_argnames='implementation')


def by_hand(lhs, values, scale, sizes):
  """NumPy in float64, one row after the other."""
  out, row = np.zeros((len(lhs), values.shape[2])), 0
  for expert, size in enumerate(sizes):
    for _ in range(size):
      product = lhs[row].astype(np.float64) @ values[expert].astype(np.float64)
      out[row] = product * scale[expert, 0]
      row += 1
  return out


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
@pytest.mark.parametrize('kind', KINDS)
def test_rows_meet_the_matrix_of_their_group(kind, case, implementation):
  """The rows past the last group hold NaN in every case that has such rows."""
  arrays = case.arrays('float32')
  weights = quantise(jnp.asarray(arrays['rhs']), kind)
  with interpreted(implementation):
    out = matmul(arrays['lhs'], weights, arrays['group_sizes'], implementation=implementation)
  wanted = by_hand(arrays['lhs'], *map(np.asarray, weights), case.sizes)
  assert str(weights.values.dtype) == kind
  np.testing.assert_allclose(out, wanted, atol=1e-5)


@hypothesis.given(hnp.arrays(np.float32, (2, 5, 3), elements=st.floats(-8, 8, width=32)))
def test_no_entry_moves_by_more_than_half_a_level(rhs):
  values, scale = map(np.asarray, quantise(jnp.asarray(rhs)))
  assert values.dtype == np.int8 and np.abs(values.astype(int)).max(initial=0) <= 127
  assert (np.abs(values * scale - rhs) <= 0.5 * scale * (1 + 1e-5)).all()
  largest = np.abs(rhs).max(axis=1, keepdims=True)
  small = largest < 127 * np.finfo(np.float32).tiny
  np.testing.assert_allclose(np.where(small, 1, largest / 127), scale, rtol=1e-6)


@hypothesis.given(hnp.arrays(np.float32, (2, 5, 3), elements=st.floats(-8, 8, width=32)))
def test_e4m3_rounds_to_three_bits_of_mantissa(rhs):
  """Every value of the type is tried: none is nearer to the entry than the one that was taken."""
  values, scale = map(np.asarray, quantise(jnp.asarray(rhs), 'float8_e4m3fn'))
  every = np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float64)
  every = every[np.isfinite(every)]
  assert every.max() == 448 and len(every) == 254
  exact = rhs.astype(np.float64) / scale
  nearest = np.abs(exact[..., None] - every).min(axis=-1)
  found = np.abs(values.astype(np.float64) - exact)
  assert (found <= nearest + 1e-6 * np.abs(exact)).all()
  assert (found <= np.maximum(np.abs(exact) / 16 * (1 + 1e-5), 2.0**-10)).all()


@pytest.mark.parametrize('kind', KINDS)
def test_a_column_too_small_for_a_scale_becomes_zero(kind):
  values, scale = quantise(jnp.full((1, 2, 1), 2e-38, jnp.float32), kind)
  assert (np.asarray(values, np.float32) == 0).all() and scale == 1


@pytest.mark.parametrize('kind', KINDS)
def test_a_column_that_is_not_finite_stays_not_finite(kind):
  rhs = jnp.ones((1, 2, 3)).at[0, 1, 1].set(jnp.nan).at[0, 0, 2].set(jnp.inf)
  weights = quantise(rhs, kind)
  out = quantised_matmul(jnp.ones((1, 2)), weights, jnp.ones(1, jnp.int32))
  assert np.isfinite(out[0]).tolist() == [True, False, False]


@pytest.mark.parametrize('implementation', BODIES)
@pytest.mark.parametrize('kind', KINDS)
def test_bfloat16_rows_round_the_result_only(kind, implementation):
  arrays = CASES[1].arrays('float32')
  lhs, weights = (
    jnp.asarray(arrays['lhs'], jnp.bfloat16),
    quantise(jnp.asarray(arrays['rhs']), kind),
  )
  with interpreted(implementation):
    out = matmul(lhs, weights, arrays['group_sizes'], implementation=implementation)
  wanted = by_hand(np.asarray(lhs, np.float64), *map(np.asarray, weights), CASES[1].sizes)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=2**-8, atol=1e-5)


def test_bad_arguments_are_refused():
  lhs, sizes = jnp.ones((4, 3)), jnp.ones(2, jnp.int32)
  weights = quantise(jnp.ones((2, 3, 5)))
  with pytest.raises(
    ValueError,
    match=r'int8 values, scale.shape=\(2, 5\), expected int8 or float8_e4m3fn and \(2, 1, 5\)',
  ):
    quantised_matmul(lhs, Quantised(weights.values, weights.scale[:, 0]), sizes)
  with pytest.raises(ValueError, match="dtype='float8_e5m2': accepted are int8, float8_e4m3fn"):
    quantise(jnp.ones((2, 3, 5)), 'float8_e5m2')
  with pytest.raises(ValueError, match='int32 values'):
    quantised_matmul(lhs, weights._replace(values=weights.values.astype(jnp.int32)), sizes)
  with pytest.raises(ValueError, match=r'group_sizes=\[3, 3\]'):
    quantised_matmul(lhs, weights, 3 * sizes)
  with pytest.raises(ValueError, match="implementation='fast'"):
    quantised_matmul(lhs, weights, sizes, implementation='fast')
  loss = functools.partial(quantised_matmul, rhs=weights, group_sizes=sizes)
  with pytest.raises(Unsupported, match='quantised_matmul has no gradient'):
    jax.grad(lambda x: jnp.sum(loss(x)))(lhs)
