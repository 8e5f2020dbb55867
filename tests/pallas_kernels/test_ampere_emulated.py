"""The kernels for Ampere run on the CPU from their PTX, instruction by instruction, and their results are right.

The interpreter of test_ampere.py has products and copies of its own. Here run those of the chip, with the fragments
that Mosaic chose: it has counted both rows of a register as the first of them. Needs what test_ampere_compiled.py
needs.
"""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.ampere import machine, tiles
from pallas_kernels.grouped_matmul.cases import Case
from pallas_kernels.hopper.tiles import rows_per_tile
from tests.pallas_kernels import products
from tests.pallas_kernels.aot import ptx_ampere
from tests.pallas_kernels.test_ampere import ROUNDING
from tests.pallas_kernels.test_ampere_compiled import SCRIPT
from tests.pallas_kernels.test_gpu_compiled import facts

pytestmark = pytest.mark.aot

TYPES = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16, 'float32': np.float32}
WIDTHS = 128, 256
# Tiles of 64 and of 128 rows; edges that are no multiples of 8; sums of one stage, of none and of more than the ring.
CASES = {'180': Case('', 180, (37, 0, 131)), '300': Case('', 300, (1, 186, 100))}
PROGRAMS = (
  'out-bfloat16-180-bfloat16',
  'out-float16-300-float16',
  'dlhs-bfloat16-300-bfloat16',
  'dlhs-float16-180-float16',
  'drhs-bfloat16-180-bfloat16',
  'drhs-float16-300-float32',
)
GUARD = 4096  # bytes of NaN around each array


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """Facts of each program, with its PTX."""
  if not hasattr(mosaic_gpu, 'mma'):
    pytest.skip('this jax is older than 0.11: its Pallas has no plgpu.mma')
  folder = tmp_path_factory.mktemp('emulated')
  rows = facts(SCRIPT, folder, *PROGRAMS)
  text = lambda program: next((folder / program).glob('*.ptx')).read_text(encoding='utf-8')
  return {row['program']: row | {'ptx': text(row['program'])} for row in rows}


class Memory:
  """Global memory: arrays with NaN between them."""

  def __init__(self):
    self.bytes, self.end = np.full(2**21, 255, np.uint8), GUARD

  def put(self, array) -> int:
    """The address of a copy."""
    array, place = np.ascontiguousarray(array), self.end
    self.bytes[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
    self.end = -(-(place + array.nbytes + GUARD) // 256) * 256
    assert self.end < len(self.bytes)
    return place


class Inputs:
  """Arguments of a kernel, in the order in which it first uses them, and the result by hand."""

  def __init__(self, program):
    part, dtype, rows, kind = program.split('-')
    self.case, self.dtype, self.memory = CASES[rows], dtype, Memory()
    lhs, rhs, starts, dout = products.matmul_inputs(self.case, dtype, *WIDTHS)
    self.wanted = products.matmul_by_hand(lhs, rhs, starts, dout)[part]
    put = self.memory.put
    # More rows than asked for, NaN like the space around: who writes there is seen.
    self.out = put(np.full(self.wanted.size, np.nan, TYPES[kind]))
    self.kind, self.after = TYPES[kind], self.memory.end
    if part == 'drhs':
      left, right = (put(tiles.padded(x, tiles.DEPTH)) for x in (lhs, dout))
      position = put(machine.numbered(tiles.DEPTH, tiles.COLUMNS, jnp.dtype(dtype)))
      self.parameters = put(starts), position, self.out, left, right
      self.blocks = len(self.case.sizes) * (WIDTHS[0] // 128) * (WIDTHS[1] // 128)
      return
    tile = rows_per_tile(self.case.num_rows, len(self.case.sizes))
    cut = tiles.cut(starts, self.case.num_rows, tile)
    expert, low, high, used = map(put, cut)
    left = put(tiles.padded(lhs if part == 'out' else dout, tile))
    self.parameters = used, expert, low, put(rhs), high, self.out, left
    self.blocks = len(cut.expert) * (self.wanted.shape[1] // 128)

  def result(self):
    found = self.memory.bytes[self.out : self.out + self.wanted.size * np.dtype(self.kind).itemsize]
    return found.view(self.kind).reshape(self.wanted.shape)


def run(program, compiled, text, *, late):
  """The relative error of the result, and the blocks."""
  inputs = Inputs(program)
  before = inputs.memory.bytes.copy()
  blocks = []
  for block in range(inputs.blocks):
    blocks.append(
      ptx_ampere.Block(
        text, inputs.parameters, compiled['shared memory'], inputs.memory.bytes, block, late=late
      )
    )
    blocks[-1].run()
  written = np.flatnonzero(before != inputs.memory.bytes)
  size = inputs.wanted.size * np.dtype(inputs.kind).itemsize
  assert inputs.out <= written.min() and written.max() < inputs.out + size
  found = np.asarray(inputs.result(), np.float64)
  error = np.abs(found - inputs.wanted).max() / np.abs(inputs.wanted).max()  # NaN if any is
  return error, blocks


@pytest.mark.parametrize('program', PROGRAMS)
@pytest.mark.parametrize('late', [False, True])
def test_the_compiled_kernel_is_right_and_reads_no_bank_twice(compiled, program, late):
  """Copies may land at once, or when they are waited for and not before."""
  error, blocks = run(program, compiled[program], compiled[program]['ptx'], late=late)
  result = program.rsplit('-', 1)[1]
  assert error < ROUNDING.get(result, 1e-5)
  assert {block.conflicts for block in blocks} <= {0, 1}
  assert sum(block.products for block in blocks) > 0


def changed(text, pattern, new):
  wrong = re.sub(pattern, new, text)
  assert wrong != text
  return wrong


def test_two_rows_of_a_register_that_count_as_one_are_seen(compiled):
  """The control, and the defect that nothing else has shown: rows of another expert are added."""
  program = 'drhs-bfloat16-180-bfloat16'
  same = r'\1;\n\tmov.b16 \3, \2'
  text = changed(
    compiled[program]['ptx'], r'(ld\.global\.v2\.b16 \t\{(%rs\d+), (%rs\d+)\}.*)', same
  )
  error, _ = run(program, compiled[program], text, late=False)
  assert not error < 2**-6


@pytest.mark.parametrize('program', PROGRAMS[::2])
def test_a_wait_for_too_little_is_seen(compiled, program):
  """The control of copies that land late: one stage more may be under way than the ring allows."""
  text = changed(compiled[program]['ptx'], r'(cp\.async\.wait_group\s+)2', r'\g<1>4')
  error, _ = run(program, compiled[program], text, late=True)
  assert not error < 2**-6
