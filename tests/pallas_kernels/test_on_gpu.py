"""The whole tables of cases on an NVIDIA GPU, for the bodies that exist for it; skipped without one.

`JAX_PLATFORMS=cuda scripts/python -m pytest -m gpu` runs them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped_matmul, pack, quantise, quantised_matmul, top_k
from pallas_kernels.expert_ffn.cases import CASES as FFN_CASES
from pallas_kernels.grouped_matmul.cases import CASES
from pallas_kernels.routing.cases import PACK_CASES, TOP_K_CASES
from tests.pallas_kernels import products
from tests.pallas_kernels.products import distance

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def hopper():
  device = jax.devices()[0]
  if device.platform != 'gpu' or getattr(device, 'compute_capability', '') != '9.0':
    pytest.skip('needs an NVIDIA GPU of compute capability 9.0')


ROUNDING = {'bfloat16': 2**-8, 'float16': 2**-11}


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
@pytest.mark.parametrize('transpose_rhs', (False, True))
@pytest.mark.parametrize('dtype', ROUNDING)
def test_grouped_matmul(case, transpose_rhs, dtype):
  lhs, rhs, starts, dout = products.matmul_inputs(case, dtype, 256, 384)
  sizes = jnp.asarray(case.sizes, jnp.int32)

  def run(lhs, rhs):
    turned = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    options = dict(transpose_rhs=transpose_rhs, implementation='gpu')
    return grouped_matmul(lhs, turned, sizes, **options)

  out, pull = jax.vjp(jax.jit(run), lhs, rhs)
  dlhs, drhs = pull(dout)
  wanted = products.matmul_by_hand(lhs, rhs, starts, dout)
  for name, found in {'out': out, 'dlhs': dlhs, 'drhs': drhs}.items():
    assert distance(found, wanted[name]) < ROUNDING[dtype], name


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.name)
@pytest.mark.parametrize('kind', ('int8', 'float8_e4m3fn'))
@pytest.mark.parametrize('width_out', (256, 384))
@pytest.mark.parametrize('dtype', ROUNDING)
def test_quantised_matmul(case, kind, width_out, dtype):
  """Columns of very different scales, each of which is right by itself."""
  lhs, rhs, starts, dout = products.matmul_inputs(case, dtype, 256, width_out)
  scales = jnp.geomspace(1e-2, 1e2, width_out, dtype=jnp.float32)
  weights = quantise(rhs.astype(jnp.float32) * scales[None, None, :], kind)
  sizes = jnp.asarray(case.sizes, jnp.int32)
  run = jax.jit(quantised_matmul, static_argnames='implementation')
  out = np.asarray(run(lhs, weights, sizes, implementation='gpu'), np.float64)
  exact = np.asarray(weights.values, np.float64) * np.asarray(weights.scale)
  wanted = products.matmul_by_hand(lhs, exact, starts, dout)['out']
  column = np.abs(wanted).max(axis=0, keepdims=True, initial=1e-30)
  assert distance(out / column, wanted / column) < ROUNDING[dtype]


@pytest.mark.parametrize('case', FFN_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(
  ('activation', 'gated'), [('silu', True), ('gelu', True), ('relu2', False)]
)
def test_expert_ffn(case, activation, gated):
  arrays = products.ffn_inputs(case, 'bfloat16', 256, 384)
  options = dict(activation=activation, gated=gated)
  found, wanted = (
    products.ffn(arrays, 'gpu', **options),
    products.ffn_by_reference(arrays, **options),
  )
  far = {name: distance(found[name], wanted[name]) for name in wanted}
  assert max(far.values()) < 2e-2, far  # bfloat16, as in test_expert_ffn.py


def test_a_second_run_gives_the_same_bits():
  arrays = products.ffn_inputs(FFN_CASES[1], 'bfloat16', 512, 768)
  once, again = (products.ffn(arrays, 'gpu') for _ in range(2))
  for name in once:
    np.testing.assert_array_equal(once[name], again[name])


@pytest.mark.parametrize('case', TOP_K_CASES, ids=lambda case: case.name)
def test_top_k(case):
  wanted_prob, wanted = top_k(jnp.asarray(case.logits), case.k, implementation='reference')
  prob, expert = top_k(jnp.asarray(case.logits), case.k, implementation='gpu')
  np.testing.assert_array_equal(expert, wanted)
  np.testing.assert_allclose(prob, wanted_prob, rtol=1e-6)


@pytest.mark.parametrize('case', PACK_CASES, ids=lambda case: case.name)
def test_pack(case):
  rows = jnp.asarray(case.expert, jnp.int32)
  wanted = pack(rows, case.num_experts, implementation='reference')
  for one, other in zip(pack(rows, case.num_experts, implementation='gpu'), wanted, strict=True):
    np.testing.assert_array_equal(one, other)
