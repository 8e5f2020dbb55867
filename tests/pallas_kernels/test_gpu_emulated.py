"""Weights of eight bits in the registers of a compiled kernel: its PTX runs on the CPU, and its products are right.

No interpreter of Pallas knows the instructions that widen and turn (hopper/widen.py). Needs what test_gpu_compiled.py
needs.
"""

import re

import ml_dtypes
import numpy as np
import pytest

from tests.pallas_kernels import test_gpu_compiled
from tests.pallas_kernels.aot import ptx

pytestmark = pytest.mark.aot

TYPES = {'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
PROGRAMS = (
  'int8-bfloat16-256-8',
  'int8-float16-384-40',
  'float8_e4m3fn-bfloat16-384-8',
  'float8_e4m3fn-float16-256-40',
)
BLOCKS, COLUMNS, DEPTH = 132, 128, 64
EXPERTS, WIDTH = 3, 128
EXPERT_OF_TILE = (0, 2, 1)  # the last tile of rows is not used
USED = 2


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  """Facts of each program, with its PTX."""
  folder = tmp_path_factory.mktemp('emulated')
  rows = test_gpu_compiled.facts(test_gpu_compiled.SCRIPT, folder, *PROGRAMS)
  text = lambda program: next((folder / program).glob('*.ptx')).read_text(encoding='utf-8')
  return {row['program']: row | {'ptx': text(row['program'])} for row in rows}


class Inputs:
  """Every value of eight bits but NaN is among the weights."""

  def __init__(self, kind, dtype, columns, tile):
    rng = np.random.default_rng(0)
    self.dtype, self.tile, self.columns = TYPES[dtype], tile, columns
    bits = rng.permuted(np.arange(EXPERTS * WIDTH * columns) % 256).astype(np.uint8)
    self.bits = bits.reshape(EXPERTS, WIDTH, columns)
    if kind == 'float8_e4m3fn':
      self.bits[self.bits & 127 == 127] = 0
    self.values = self.bits.view(kind if kind == 'int8' else ml_dtypes.float8_e4m3fn)
    self.scale = rng.uniform(0.5, 2, (EXPERTS, columns)).astype(np.float32)
    self.rows = rng.normal(size=(len(EXPERT_OF_TILE) * tile, WIDTH)).astype(self.dtype)

  def fetch(self, where):
    """The bytes of a bulk copy: of rows, or of one block of an expert's columns."""
    assert where[:2] == [0, 0]
    if len(where) == 4:
      column, row = DEPTH * where[2], 8 * where[3]
      box = self.rows[row : row + self.tile, column : column + DEPTH]
      return np.ascontiguousarray(box).view(np.uint8)
    column, depth, expert = COLUMNS * where[2], 8 * where[3], where[4]
    return self.bits[expert, depth : depth + DEPTH, column : column + COLUMNS]

  def memory(self):
    """Global memory, and where used, expert and scale lie: the kernel's parameters but for its descriptors."""
    arrays = (np.int32([USED]), np.int32(EXPERT_OF_TILE), self.scale)
    memory, places = np.zeros(4096 + self.scale.nbytes, np.uint8), (0, 1024, 4096)
    for array, place in zip(arrays, places, strict=True):
      memory[place : place + array.nbytes] = array.reshape(-1).view(np.uint8)
    return memory, (places[0], places[1], 0, places[2])

  def wanted(self, row, rows, column):
    expert = EXPERT_OF_TILE[row // self.tile]
    columns = slice(column, column + COLUMNS)
    left = self.rows[row : row + rows].astype(np.float64)
    product = left @ self.values[expert][:, columns].astype(np.float64)
    return product * self.scale[expert, columns]


def run(program, facts, text):
  """(first row and column, relative error) of each block of columns that a warpgroup stores."""
  kind, dtype, columns, rows = program.split('-')
  inputs = Inputs(kind, dtype, int(columns), {'8': 16, '40': 64}[rows])
  two = (
    int(columns) % (2 * COLUMNS) == 0
  )  # blocks of columns in a tile, else the rows are shared out
  part = inputs.tile if two else inputs.tile // 2
  assert facts['products'] == [f'm64n{part}k16']
  memory, parameters = inputs.memory()
  errors = {}
  for block in range(USED * int(columns) // COLUMNS // (2 if two else 1)):
    stored, conflicts = ptx.run_block(
      text, parameters, facts['shared memory'], memory, block, inputs.fetch
    )
    assert conflicts == 1, 'words of a warp in one bank'
    for shared, place, where in stored:
      assert where[:2] == [0, 0]
      row, column = 8 * where[3], DEPTH * where[2]
      out = shared[ptx.tiled(place, part, 2)].view(inputs.dtype).astype(np.float64)
      wanted = inputs.wanted(row, part, column)
      errors[row, column] = np.abs(out - wanted).max() / np.abs(wanted).max()
  rows, columns = range(0, USED * inputs.tile, part), range(0, int(columns), COLUMNS)
  assert errors.keys() == {(row, column) for row in rows for column in columns}
  return errors


@pytest.mark.parametrize('program', PROGRAMS)
def test_the_registers_hold_the_weights_that_the_rows_are_multiplied_by(compiled, program):
  errors = run(program, compiled[program], compiled[program]['ptx'])
  eps = float(ml_dtypes.finfo(TYPES[program.split('-')[1]]).eps)
  assert max(errors.values()) < eps, errors


def test_a_weight_from_the_column_beside_is_seen(compiled):
  """The control: the first permutation takes another byte of the words."""
  program = PROGRAMS[0]
  text = compiled[program]['ptx']
  wrong = re.sub(r'(prmt\.b32 .*, )0x0400', r'\g<1>0x1511', text, count=1)
  assert wrong != text
  assert min(run(program, compiled[program], wrong).values()) > 2**-4
