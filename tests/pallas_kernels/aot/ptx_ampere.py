"""The PTX of a kernel of Ampere run on a CPU: a block of one warpgroup, its asynchronous copies, ldmatrix and mma.

Fragments are those of the PTX ISA (ldmatrix, and mma.m16n8k16 of 16-bit types). Fresh shared memory holds NaN.
"""

import re

import numpy as np

from tests.pallas_kernels.aot.ptx import THREADS, TYPES, Threads, U, _floats, _list, _pairs

LANE, WARP = np.arange(THREADS) % 32, np.arange(THREADS) // 32
ROW, PAIR = LANE // 4, LANE % 4 * 2  # that a thread holds of a matrix of 8 x 8


class Block(Threads):
  """One block of `Threads`.

  Args:
    text, parameters, shared_bytes, memory, block: see `Threads`.
    late: copies land when they are waited for, so that who reads too early finds what was there before; else at once,
      so that who fills memory too early overwrites what is still read.
  """

  def __init__(self, text, parameters, shared_bytes, memory, block, *, late):
    super().__init__(
      text, parameters, np.full(shared_bytes, 255, np.uint8), memory, index=0, block=block
    )
    self.late, self.groups, self.open = late, [], []
    self.products = 0

  def run(self):
    super().run()
    assert not any((*self.groups, self.open)), 'copies that nobody waited for'

  def execute(self, op, operands, predicate):
    if op.startswith('cp.async.commit_group'):
      self.groups.append(self.open)
      self.open = []
    elif op.startswith('cp.async.wait_group'):
      while len(self.groups) > int(operands[0]):
        for place, source in self.groups.pop(0):
          self.land(place, source)
    elif op.startswith('cp.async.cg.shared.global'):
      self.copy(operands)
    elif op.startswith('ldmatrix'):
      self.load_matrices(op, operands)
    elif op.startswith('mma.sync'):
      self.multiply(op, operands)
    else:
      super().execute(op, operands, predicate)

  def copy(self, operands):
    place, source = (self.address(operand) for operand in operands[:2])
    assert operands[2:] == ['16'] and not (place % 16).any() and not (source % 16).any()
    assert min(place.min(), source.min()) >= 0
    if self.late:
      self.open.append((place, source))
    else:
      self.land(place, source)

  def land(self, place, source):
    piece = np.arange(16)
    self.spaces['shared'][place[:, None] + piece] = self.spaces['global'][source[:, None] + piece]

  def load_matrices(self, op, operands):
    """Four matrices of 8 x 8 for each warp; eight threads each give the addresses of a matrix' rows."""
    assert '.x4.' in op
    place = self.address(operands[1])
    assert not (place % 16).any() and (place >= 0).all()
    self.count_conflicts(place, 16)
    data = self.spaces['shared'][place[:, None] + np.arange(16)].view(np.uint16)
    data = data.reshape(4, 4, 8, 8).astype(U)  # warp, matrix, row, column
    if '.trans.' in op:
      data = data.swapaxes(2, 3)
    for i, name in enumerate(_list(operands[0])):
      low, high = (data[WARP, i, ROW, PAIR + j] for j in range(2))
      self.registers[name] = low | high << U(16)

  def multiply(self, op, operands):
    """`d = a b + c` of 16 x 16 by 16 x 8 in each warp."""
    kind = re.fullmatch(r'mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.\1\.f32', op)[1]
    assert kind in TYPES
    out, left, right, before = map(_list, operands)
    a, b = np.zeros((4, 16, 16)), np.zeros((4, 16, 8))
    for j in range(2):
      for i, name in enumerate(left):
        a[WARP, ROW + i % 2 * 8, PAIR + j + i // 2 * 8] = _pairs(self.value(name), kind)[:, j]
      for i, name in enumerate(right):
        b[WARP, PAIR + j + i * 8, ROW] = _pairs(self.value(name), kind)[:, j]
    product = (a @ b).astype(np.float32)
    places = [product[WARP, ROW + i // 2 * 8, PAIR + i % 2] for i in range(4)]
    sums = [_floats(self.value(name)) + more for name, more in zip(before, places, strict=True)]
    for name, value in zip(out, sums, strict=True):
      self.registers[name] = value.view(np.uint32).astype(U)
    self.products += 1
