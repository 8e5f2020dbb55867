"""The PTX of a warp-specialised kernel run on a CPU, one warpgroup after the other, in NumPy over its 128 threads.

For kernels whose registers hold what no interpreter of Pallas knows. It knows the instructions that such kernels have
had so far and refuses others. Barriers order nothing here: the loading warpgroup runs first and its bulk copies are
kept; a consumer that waits for a stage gets the copies that complete it. wgmma follows the fragments and the swizzle of
128 bytes of the PTX ISA (sections 9.7.15, matrix fragments and descriptors), and bulk copies that swizzle.
"""

import operator
import re
from collections import defaultdict

import ml_dtypes
import numpy as np

THREADS = 128
U = np.uint64
TYPES = {'bf16': ml_dtypes.bfloat16, 'f16': np.float16}
ORDERING = ('bar.', 'fence', 'setmaxnreg', 'wgmma.fence', 'wgmma.commit', 'wgmma.wait', 'prefetch')
ORDERING += ('cp.async.bulk.wait', 'cp.async.bulk.commit', 'mbarrier.init', 'mbarrier.arrive')
BITS = {'and': operator.and_, 'or': operator.or_, 'xor': operator.xor}
SUMS = {'add': operator.add, 'sub': operator.sub, 'mul': operator.mul}
COMPARISONS = ('eq', 'ne', 'lt', 'le', 'gt', 'ge')


def swizzled(address):
  """Where 128-byte swizzling puts a byte: pieces of 16 change places within a line, by the line's index of eight."""
  return address ^ (((address >> 7) & 7) << 4)


def tiled(base, rows, line):
  """Addresses of the bytes of `rows` rows of `line` 128-byte tiles, `[rows, 128 * line]`."""
  row, byte = np.meshgrid(np.arange(rows), np.arange(128 * line), indexing='ij')
  place = (row // 8 * line + byte // 128) * 1024 + row % 8 * 128 + byte % 128
  return swizzled(base + place)


def parse(text):
  """(instructions, position of each label)."""
  body = text[text.index('.visible .entry') : text.index('$L__func_end0')]
  body = re.sub(r'//.*', '', body[body.index('{') + 1 :])
  body = re.sub(r'^\s*\.(loc|pragma|shared).*$|\.reg [^;]*;', '', body, flags=re.M)
  program, labels = [], {}
  for line in re.split(r'[;\n]', body):
    line = line.strip()
    if label := re.match(r'(\$?\w+):', line):
      labels[label[1]] = len(program)
      line = line[label.end() :].strip()
    if line.startswith('{') and not re.match(r'\{[%\w, ]*\}', line):
      line = line[1:].strip()
    if line.count('}') > line.count('{'):
      line = line[: line.rindex('}')].strip()
    if line:
      program.append(line)
  return program, labels


def _signed(x):
  return x.astype(np.uint32).view(np.int32).astype(np.int64)


def _floats(x):
  return x.astype(np.uint32).view(np.float32)


def _pairs(x, kind):
  """`[threads, 2]` of the 16-bit type in each register."""
  return x.astype(np.uint32).view(np.uint16).reshape(-1, 2).view(TYPES[kind]).astype(np.float32)


def _packed(first, second, kind):
  pair = np.stack([first, second], axis=1).astype(TYPES[kind])
  return pair.view(np.uint16).view(np.uint32).reshape(-1).astype(U)


class Warpgroup:
  """Runs one warpgroup of block `block`.

  Args:
    text: the PTX.
    parameters: values of the kernel's parameters: addresses in `memory`.
    shared: bytes of shared memory.
    memory: bytes of global memory.
    index: of the warpgroup.
    block: of the grid.
    load: `(warpgroup, shared address, coordinates, barrier)` for each bulk copy to shared memory.
    store: `(warpgroup, shared address, coordinates)` for each copy back.
    wait: `(warpgroup, barrier)`.
  """

  def __init__(self, text, parameters, shared, memory, index, block, *, load, store, wait):
    self.program, self.labels = parse(text)
    self.parameters, self.spaces = parameters, {'shared': shared, 'global': memory}
    self.index, self.block = index, block
    self.load, self.store, self.wait = load, store, wait
    self.registers = {}
    self.conflicts = 0  # lanes that read different words of one bank, at most

  def run(self):
    at = 0
    while True:
      line, at, predicate = self.program[at], at + 1, None
      if match := re.match(r'@(!?)(%?\w+)\s+(.*)$', line):
        if match[2] == 'P1':
          continue  # the loop of a wait
        predicate, line = self.registers[match[2]].astype(bool) != bool(match[1]), match[3]
      op, rest = re.match(r'(\S+)\s*(.*)$', line).groups()
      if op == 'ret':
        return
      if op.startswith('bra'):
        taken = rest != 'LAB_WAIT' and (predicate is None or bool(predicate[0]))
        assert predicate is None or (predicate == predicate[0]).all(), f'threads part: {line}'
        at = self.labels[rest] if taken else at
      elif not op.startswith(ORDERING):
        self.step(op, rest, predicate)

  def value(self, name):
    if name in self.registers:
      return self.registers[name]
    if name.startswith('%tid'):
      return np.arange(THREADS, dtype=U) + U(self.index * THREADS)
    if name.startswith('%ctaid'):
      return np.full(THREADS, self.block, U)
    if name == '__dynamic_shmem__0' or '_param_' in name:  # descriptors of bulk copies
      name = '0'
    return np.full(THREADS, int(name, 0) % 2**64, U)

  def address(self, text):
    name, offset = re.match(r'\[([^\]+]+?)(?:\+(-?\d+))?\]', text).groups()
    return self.value(name).astype(np.int64) + int(offset or 0)

  def step(self, op, rest, predicate):
    family = op.split('.')[0]
    operands = re.findall(r'\{[^}]*\}|\[[^\]]*\{[^}]*\}[^\]]*\]|\[[^\]]*\]|[^,\s]+', rest)
    if op.startswith('mbarrier.try_wait'):
      self.wait(self, int(self.address(operands[1])[0]))
    elif op.startswith('cp.async.bulk.tensor'):
      self.bulk_copy(operands, predicate)
    elif op.startswith('wgmma.mma_async'):
      self.multiply(op, operands)
    elif op.startswith('ld.param'):
      index = int(operands[1].strip('[]').rsplit('_', 1)[1])
      self.registers[operands[0]] = np.full(THREADS, self.parameters[index], U)
    elif family in ('ld', 'st'):
      self.move(op, operands)
    elif family == 'elect':
      self.registers[operands[0].split('|')[1]] = np.arange(THREADS) % 32 == 0
    elif operands[0].startswith('{'):  # mov.b32 {low, high}, pair
      halves = _list(operands[0])
      for i, name in enumerate(halves):
        self.registers[name] = self.value(operands[1]) >> U(16 * i) & U(0xFFFF)
    else:
      result = self.compute(op, [self.value(name) for name in operands[1:]], operands)
      wide = op.endswith('64') or '.wide' in op or result.dtype == bool
      self.registers[operands[0]] = result if wide else result.astype(U) & U(0xFFFFFFFF)

  def compute(self, op, x, operands):
    """The value of an arithmetic instruction of the operands `x`."""
    family, *parts, kind = op.split('.')
    if op.startswith(('mov', 'cvta')):
      return x[0]
    if family == 'shfl':
      return np.repeat(x[0][::32], 32)
    if family == 'prmt':
      return _permuted(x[0] | x[1] << U(32), int(operands[3], 0))
    if family in BITS:
      return BITS[family](x[0], x[1])
    if family == 'shl':
      return x[0] << x[1]
    if family == 'shr':
      return (_signed(x[0]) >> x[1].astype(np.int64)).astype(U) if kind == 's32' else x[0] >> x[1]
    if family == 'bfe':
      return x[0] >> x[1] & U(2 ** int(operands[3]) - 1)
    if family == 'cvt' and kind in ('u32', 'u64') and parts[0] in ('u16', 'u32', 'u64'):
      return x[0] & U(0xFFFF if parts[0] == 'u16' else 0xFFFFFFFF)
    if family == 'setp':
      return self.compare(parts, kind, x)
    if 'f' in kind or 'e4m3' in kind:
      return _float_arithmetic(op, x)
    return _integer_arithmetic(op, x)

  def compare(self, parts, kind, x):
    assert parts[0] in COMPARISONS
    sides = [_signed(side) for side in x[:2]] if kind == 's32' else x[:2]
    found = getattr(operator, parts[0])(*sides)
    return BITS[parts[1]](found, x[2]) if parts[1:] else found

  def move(self, op, operands):
    """Loads and stores of one, two or four words."""
    _, space, *_, kind = op.split('.')
    size = int(kind[1:]) // 8
    registers, place = operands if op.startswith('ld') else operands[::-1]
    names = _list(registers)
    place, memory = self.address(place), self.spaces[space.partition(':')[0]]
    assert (place % (size * len(names)) == 0).all(), op
    for i, name in enumerate(names):
      where = (place + i * size)[:, None] + np.arange(size)
      shifts = (8 * np.arange(size)).astype(U)
      if op.startswith('ld'):
        self.registers[name] = (memory[where].astype(U) << shifts).sum(axis=1, dtype=U)
      else:
        memory[where] = (self.value(name)[:, None] >> shifts & U(255)).astype(np.uint8)
    if op.startswith('ld.shared'):
      for warp in place.reshape(4, 32):
        banks = np.bincount(np.unique(warp // 4) % 32)
        self.conflicts = max(self.conflicts, int(banks.max()))

  def bulk_copy(self, operands, predicate):
    assert predicate.sum() == 1
    first, second, *barrier = operands
    source = first if '{' in first else second
    coordinates = [int(_signed(self.value(c))[0]) for c in _list(re.search(r'\{.*\}', source)[0])]
    place = int(self.address(second if '{' in first else first)[0])
    if '{' in first:
      self.store(self, place, coordinates)
    else:
      self.load(self, place, coordinates, int(self.address(barrier[0])[0]))

  def multiply(self, op, operands):
    """`acc += a b`: a from registers, b as its rows `[n, 16]` in shared memory."""
    width, kind = int(re.search(r'm64n(\d+)k16', op)[1]), op.rsplit('.', 1)[1]
    accumulators, left = _list(operands[0]), _list(operands[1])
    assert operands[4:] == ['1', '1', '0'], operands[4:]  # no signs, b is not transposed
    thread = np.arange(THREADS)
    row, pair = thread // 32 * 16 + thread % 32 // 4, thread % 4 * 2
    a = np.zeros((64, 16))
    for i, name in enumerate(left):
      for j in range(2):
        a[row + i % 2 * 8, pair + j + i // 2 * 8] = _pairs(self.value(name), kind)[:, j]
    descriptor = int(self.value(operands[2])[0])
    assert descriptor >> 62 == 1  # swizzles 128 bytes
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    n, k = np.meshgrid(np.arange(width), np.arange(16), indexing='ij')
    place = swizzled(start + n // 8 * stride + n % 8 * 128 + 2 * k)
    b = self.spaces['shared'][place[..., None] + np.arange(2)].view(TYPES[kind])[..., 0]
    product = (a @ b.astype(np.float64).T).astype(np.float32)
    for i, name in enumerate(accumulators):
      more = product[row + i // 2 % 2 * 8, pair + i % 2 + i // 4 * 8]
      self.registers[name] = (_floats(self.value(name)) + more).view(np.uint32).astype(U)


def _list(text):
  return [name.strip() for name in text.strip('{}').split(',')]


def _permuted(eight, selector):
  found = np.zeros_like(eight)
  for i in range(4):
    choice = selector >> 4 * i & 15
    assert choice < 8, 'sign replication'
    found |= (eight >> U(8 * choice) & U(255)) << U(8 * i)
  return found


def _float_arithmetic(op, x):
  match op.split('.'):
    case ['sub', 'rn', kind] if kind.endswith('x2'):
      pairs = _pairs(x[0], kind[:-2]) - _pairs(x[1], kind[:-2])
      return _packed(*pairs.T, kind[:-2])
    case ['cvt', 'rn', 'f16x2', 'e4m3x2']:
      pairs = x[0].astype(np.uint16).view(np.uint8).view(ml_dtypes.float8_e4m3fn).reshape(-1, 2)
      return _packed(*pairs.astype(np.float32).T, 'f16')
    case ['cvt', 'f32', 'f16']:
      return x[0].astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    case ['cvt', 'rn', kind, 'f32'] if kind.endswith('x2'):
      return _packed(_floats(x[1]), _floats(x[0]), kind[:-2])
    case ['mul', 'rn', 'f32']:
      return (_floats(x[0]) * _floats(x[1])).view(np.uint32)
  raise NotImplementedError(op)


def _integer_arithmetic(op, x):
  family, *_, kind = op.split('.')
  signed = [_signed(side) for side in x] if kind == 's32' else x
  match op.split('.')[:2]:
    case ['mul', 'hi']:
      return (signed[0] * signed[1] >> 32).astype(U)
    case ['mad', 'lo']:
      return (signed[0] * signed[1] + signed[2]).astype(U)
    case ['div', _]:
      return np.trunc(signed[0] / signed[1]).astype(np.int64).astype(U)
    case ['min' | 'max', _]:
      return getattr(np, f'{family}imum')(*signed).astype(U)
  if family in SUMS:
    return SUMS[family](*signed).astype(U)
  raise NotImplementedError(op)


def run_block(text, parameters, shared_bytes, memory, block, fetch):
  """Both consumers of a block, `[(shared memory, address, coordinates)]` of what they store, and their conflicts.

  `fetch(coordinates)` gives the bytes `[rows, 128 * tiles]` that a bulk copy brings.
  """
  pending, stored, conflicts = defaultdict(list), [], 0
  keep = lambda group, place, where, barrier: pending[barrier].append((place, where))
  ignore = lambda *args: None
  shared = np.zeros(shared_bytes, np.uint8)
  loader = Warpgroup(
    text, parameters, shared, memory, 2, block, load=keep, store=ignore, wait=ignore
  )
  loader.run()
  for index in range(2):
    left = {barrier: list(copies) for barrier, copies in pending.items()}

    def wait(group, barrier, left=left):
      # One arrival of all copies of a stage; stages are not refilled in kernels as short as these.
      for place, where in left.pop(barrier, []):
        data = fetch(where)
        shared[tiled(place, data.shape[0], data.shape[1] // 128)] = data

    def store(group, place, where):
      stored.append((shared.copy(), place, where))

    group = Warpgroup(
      text, parameters, shared, memory, index, block, load=ignore, store=store, wait=wait
    )
    group.run()
    assert not left, 'stages that nobody read'
    conflicts = max(conflicts, group.conflicts)
  return stored, conflicts
