"""The bodies for Ampere compiled to sm_80 machine code, without a GPU: what it asks of the multiprocessor.

Needs jax 0.11 or newer, so Python 3.12, and what test_gpu_compiled.py needs. That a kernel compiles so proves no
ordering of memory and no speed.
"""

import collections

import jax
import pytest
from jax.experimental.pallas import mosaic_gpu

from tests.pallas_kernels.test_gpu_compiled import facts

pytestmark = pytest.mark.aot

SCRIPT = 'tests/pallas_kernels/aot/compile_for_a100.py'
# Of a multiprocessor; each block takes 1024 bytes more than it asks for, and Ada gives a block at most 99 KiB.
THREADS, REGISTERS, SHARED_MEMORY, RESERVED, ADA = 128, 65536, 164 * 1024, 1024, 99 * 1024

TYPES = {'wide': 'bf16', 'narrow': 'f16', 'layer': 'bf16', 'plain layer': 'f16'}


@pytest.fixture(scope='module')
def kernels(tmp_path_factory):
  """Facts, a kernel each."""
  if not hasattr(mosaic_gpu, 'mma'):
    pytest.skip('this jax is older than 0.11: its Pallas has no plgpu.mma')
  return facts(SCRIPT, tmp_path_factory.mktemp('kernels'))


def test_value_and_gradients_are_compiled_for_sm_80(kernels):
  """Of a product the value and the gradient of the rows are one kernel, that of the matrices another.

  Those of gate and up, of one shape, are compiled once from jax 0.12 on.
  """
  names = {program: [] for program in TYPES}
  for row in kernels:
    names[row['program']].append(row['kernel'].rstrip('0123456789'))
  found = {program: sorted(collections.Counter(kind).items()) for program, kind in names.items()}
  count = lambda shapes: [('grouped_matmul_', 2 * shapes), ('grouped_matmul_drhs_', shapes)]
  layer = 2 if jax.__version_info__ >= (0, 12) else 3
  plain = {'wide': count(1), 'narrow': count(1), 'plain layer': count(2)}
  assert found == {'layer': count(layer), **plain}
  assert {row['target'] for row in kernels} == {'sm_80'}


def test_nothing_is_spilled_and_two_blocks_fit_a_multiprocessor(kernels):
  for row in kernels:
    assert row['stack'] == 0 and row['spills'] and not any(row['spills']), row
    assert 2 * row['registers'] * THREADS <= REGISTERS, row
    assert 2 * (row['shared memory'] + RESERVED) <= SHARED_MEMORY, row
    assert row['shared memory'] <= ADA, row


def test_products_are_those_of_the_tensor_cores_and_their_operands_come_four_matrices_at_a_time(
  kernels,
):
  for row in kernels:
    assert row['products'] == ['m16n8k16'] and row['loads of operands'] > 0, row
    assert row['types'] == [TYPES[row['program']]], row


def test_copies_are_asynchronous_in_pieces_of_16_bytes_and_results_leave_in_such(kernels):
  for row in kernels:
    assert row['copies'] == [['cg', '16']], row
    assert row['waits'] == [0, 2], row  # a stage of two copies may be under way; at the end none
    alone = {'b16'} if 'drhs' not in row['kernel'] else set()  # rows that fill no chunk
    assert set(row['stores']) == {'v4.b32', *alone}, row
