"""The whole table of cases on an NVIDIA GPU of Ampere or Ada; skipped without one, as test_on_gpu.py is.

`JAX_PLATFORMS=cuda scripts/python -m pytest -m gpu` runs both. Nothing else has run the compiled kernels.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported, chips, grouped_matmul
from pallas_kernels.ampere import machine
from pallas_kernels.expert_ffn.cases import CASES as FFN_CASES
from pallas_kernels.grouped_matmul.cases import CASES
from tests.pallas_kernels import products
from tests.pallas_kernels.test_ampere import ROUNDING
from tests.pallas_kernels.test_ampere_ffn import TOLERANCE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def ampere():
  if not hasattr(machine.plgpu, 'mma'):
    pytest.skip('needs jax 0.11 or newer')
  try:
    chips.check_device('grouped_matmul', 'ampere', jax.devices()[0])
  except Unsupported as error:
    pytest.skip(str(error))


def value_and_gradients(case, dtype, transpose_rhs):
  lhs, rhs, starts, dout = products.matmul_inputs(case, dtype, 256, 384)
  sizes = jnp.asarray(case.sizes, jnp.int32)

  def run(lhs, rhs):
    turned = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    options = dict(transpose_rhs=transpose_rhs, implementation='ampere')
    return grouped_matmul(lhs, turned, sizes, **options)

  out, pull = jax.vjp(jax.jit(run), lhs, rhs)
  dlhs, drhs = pull(dout)
  return {'out': out, 'dlhs': dlhs, 'drhs': drhs}, products.matmul_by_hand(lhs, rhs, starts, dout)


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
@pytest.mark.parametrize('transpose_rhs', (False, True))
@pytest.mark.parametrize('dtype', ROUNDING)
def test_grouped_matmul_on_ampere(case, transpose_rhs, dtype):
  found, wanted = value_and_gradients(case, dtype, transpose_rhs)
  for name in wanted:
    assert products.distance(found[name], wanted[name]) < ROUNDING[dtype], name


@pytest.mark.parametrize('case', FFN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(('activation', 'gated'), [('silu', True), ('relu2', False)])
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_expert_ffn_on_ampere(case, activation, gated, dtype):
  arrays = products.ffn_inputs(case, dtype, 256, 384)
  options = dict(activation=activation, gated=gated)
  found = products.ffn(arrays, 'ampere', **options)
  wanted = products.ffn_by_reference(arrays, **options)
  for name in wanted:
    assert products.distance(found[name], wanted[name]) < TOLERANCE[dtype], name


def test_a_second_run_gives_the_same_bits():
  (once, _), (again, _) = (value_and_gradients(CASES[1], 'bfloat16', False) for _ in range(2))
  for name in once:
    np.testing.assert_array_equal(once[name], again[name])
