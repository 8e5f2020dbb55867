"""PTX run on a CPU, in NumPy over the 128 threads of a warpgroup, which go through it together.

For kernels whose registers hold what no interpreter of Pallas knows. It knows the instructions that such kernels have
had so far and refuses others. Barriers order nothing here. Kernels of Ampere: ptx_ampere.py.

Of a warp-specialised kernel of Hopper the loading warpgroup runs first and its bulk copies are kept; a consumer that
waits for a stage gets the copies that complete it. wgmma follows the fragments and the swizzle of 128 bytes of the PTX
ISA (sections 9.7.15, matrix fragments and descriptors), and bulk copies that swizzle.
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


def _integers(x, kind):
  """The integers of a type in registers, signed ones as int64."""
  bits = int(kind[1:])
  signed = kind[0] == 's'
  values = x.astype(f'uint{bits}')
  return values.view(f'int{bits}').astype(np.int64) if signed else values.astype(U)


def _signed(x):
  return _integers(x, 's32')


def _narrowed(x, op):
  """What a register of the width of the result keeps."""
  if op.endswith('64') or '.wide' in op or op.startswith(('cvt.u64', 'cvt.s64')):
    return x.astype(U)
  half = op.endswith('16') and not op.startswith('cvt.u32') and not op.startswith('cvt.f32')
  return x.astype(U) & U(0xFFFF if half else 0xFFFFFFFF)


def _floats(x):
  return x.astype(np.uint32).view(np.float32)


def _pairs(x, kind):
  """`[threads, 2]` of the 16-bit type in each register."""
  return x.astype(np.uint32).view(np.uint16).reshape(-1, 2).view(TYPES[kind]).astype(np.float32)


def _packed(first, second, kind):
  pair = np.stack([first, second], axis=1).astype(TYPES[kind])
  return pair.view(np.uint16).view(np.uint32).reshape(-1).astype(U)


class Threads:
  """Runs the threads of one warpgroup of block `block`.

  Args:
    text: the PTX.
    parameters: values of the kernel's parameters: addresses in `memory`.
    shared: bytes of shared memory.
    memory: bytes of global memory.
    index: of the warpgroup.
    block: of the grid.
  """

  def __init__(self, text, parameters, shared, memory, index, block):
    self.program, self.labels = parse(text)
    self.parameters, self.spaces = parameters, {'shared': shared, 'global': memory}
    self.index, self.block = index, block
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
    if name.startswith('{'):  # of two halves
      low, high = (self.value(half) for half in _list(name))
      return low | high << U(16)
    if name in self.registers:
      return self.registers[name]
    if name.startswith('%tid'):
      return np.arange(THREADS, dtype=U) + U(self.index * THREADS)
    if name.startswith('%ctaid'):
      return np.full(THREADS, self.block, U)
    if name == '__dynamic_shmem__0' or '_param_' in name:  # descriptors of bulk copies
      name = '0'
    value = int(name[2:], 16) if name.startswith('0f') else int(name, 0)
    return np.full(THREADS, value % 2**64, U)

  def address(self, text):
    name, offset = re.match(r'\[([^\]+]+?)(?:\+(-?\d+))?\]', text).groups()
    return self.value(name).astype(np.int64) + int(offset or 0)

  def step(self, op, rest, predicate):
    operands = re.findall(r'\{[^}]*\}|\[[^\]]*\{[^}]*\}[^\]]*\]|\[[^\]]*\]|[^,\s]+', rest)
    self.execute(op, operands, predicate)

  def execute(self, op, operands, predicate):
    del predicate  # only copies have one, besides branches
    family = op.split('.')[0]
    if op.startswith('ld.param'):
      index = int(operands[1].strip('[]').rsplit('_', 1)[1])
      self.registers[operands[0]] = np.full(THREADS, self.parameters[index], U)
    elif family in ('ld', 'st'):
      self.move(op, operands)
    elif family == 'elect':
      self.registers[operands[0].split('|')[1]] = np.arange(THREADS) % 32 == 0
    elif operands[0].startswith('{'):  # mov.b32 {low, high}, pair
      for i, name in enumerate(_list(operands[0])):
        self.registers[name] = self.value(operands[1]) >> U(16 * i) & U(0xFFFF)
    elif op.startswith('setp') and op.endswith('x2'):  # setp.ge.f16x2 low|high, a, b
      _, comparison, kind = op.split('.')
      sides = [_pairs(self.value(name), kind[:-2]) for name in operands[1:]]
      found = getattr(operator, comparison)(*sides)
      self.registers.update(zip(operands[0].split('|'), found.T, strict=True))
    else:
      result = self.compute(op, [self.value(name) for name in operands[1:]], operands)
      self.registers[operands[0]] = result if result.dtype == bool else _narrowed(result, op)

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
      value = _integers(x[0], kind)
      return (value >> x[1].astype(value.dtype)).astype(U)
    if family == 'bfe':
      return x[0] >> x[1] & U(2 ** int(operands[3]) - 1)
    if family == 'selp':
      return np.where(x[2], x[0], x[1])
    if family == 'setp':
      return self.compare(parts, kind, x)
    if family == 'cvt' and 'f' not in op:
      return _integers(_integers(x[0], kind).astype(U), parts[0]).astype(U)
    if 'f' in kind or 'e4m3' in kind or family == 'cvt':
      return _float_arithmetic(op, x)
    return _integer_arithmetic(op, x)

  def compare(self, parts, kind, x):
    assert parts[0] in COMPARISONS
    sides = [_floats(side) if kind == 'f32' else _integers(side, kind) for side in x[:2]]
    found = getattr(operator, parts[0])(*sides)
    return BITS[parts[1]](found, x[2]) if parts[1:] else found

  def move(self, op, operands):
    """Loads and stores of one, two or four words; addresses that name no space are of global memory."""
    _, space, *_, kind = op.split('.')
    size = int(kind[1:]) // 8
    registers, place = operands if op.startswith('ld') else operands[::-1]
    names, place = _list(registers), self.address(place)
    memory = self.spaces.get(space.partition(':')[0], self.spaces['global'])
    width = size * len(names)
    assert (place % width == 0).all() and (place >= 0).all(), op
    for i, name in enumerate(names):
      where = (place + i * size)[:, None] + np.arange(size)
      shifts = (8 * np.arange(size)).astype(U)
      if op.startswith('ld'):
        read = (memory[where].astype(U) << shifts).sum(axis=1, dtype=U)
        wide = kind == 's32' and name.startswith('%rd')
        self.registers[name] = _integers(read, kind).astype(U) if wide else read
      else:
        memory[where] = (self.value(name)[:, None] >> shifts & U(255)).astype(np.uint8)
    if op.startswith('ld.shared'):
      self.count_conflicts(place, width)

  def count_conflicts(self, place, width):
    """Of reads of `width` bytes a thread, as many threads at a time as read 128 bytes, at most a warp."""
    for part in place.reshape(-1, min(32, 128 // width)):
      banks = np.bincount(np.unique((part[:, None] + np.arange(0, width, 4)) // 4) % 32)
      self.conflicts = max(self.conflicts, int(banks.max()))


class Warpgroup(Threads):
  """A warpgroup of Hopper.

  Args:
    args: of `Threads`.
    load: `(warpgroup, shared address, coordinates, barrier)` for each bulk copy to shared memory.
    store: `(warpgroup, shared address, coordinates)` for each copy back.
    wait: `(warpgroup, barrier)`.
  """

  def __init__(self, *args, load, store, wait):
    super().__init__(*args)
    self.load, self.store, self.wait = load, store, wait

  def execute(self, op, operands, predicate):
    if op.startswith('mbarrier.try_wait'):
      self.wait(self, int(self.address(operands[1])[0]))
    elif op.startswith('cp.async.bulk.tensor'):
      self.bulk_copy(operands, predicate)
    elif op.startswith('wgmma.mma_async'):
      self.multiply(op, operands)
    else:
      super().execute(op, operands, predicate)

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
    case ['cvt', 'f32', 'f16' | 'bf16' as kind]:
      return x[0].astype(np.uint16).view(TYPES[kind]).astype(np.float32).view(np.uint32)
    case ['cvt', 'rn', 'f16' | 'bf16' as kind, 'f32']:
      return _floats(x[0]).astype(TYPES[kind]).view(np.uint16)
    case ['cvt', 'rn', 'f32', 's32']:
      return _signed(x[0]).astype(np.float32).view(np.uint32)
    case ['cvt', 'rn', 'f16', 's32']:
      return _signed(x[0]).astype(np.float16).view(np.uint16)
    case ['cvt', 'rn', kind, 'f32'] if kind.endswith('x2'):
      return _packed(_floats(x[1]), _floats(x[0]), kind[:-2])
    case ['mul', 'rn', 'f32']:
      return (_floats(x[0]) * _floats(x[1])).view(np.uint32)
  raise NotImplementedError(op)


def _integer_arithmetic(op, x):
  family, *_, kind = op.split('.')
  sides = [_integers(side, kind) for side in x]
  match op.split('.')[:2]:
    case ['mul', 'hi']:
      product = [int(a) * int(b) >> int(kind[1:]) for a, b in zip(*sides, strict=True)]
      return np.array([value % 2**64 for value in product], U)
    case ['mad', 'lo']:
      return (sides[0] * sides[1] + sides[2]).astype(U)
    case ['div', _]:
      return np.trunc(sides[0] / sides[1]).astype(np.int64).astype(U)
    case ['min' | 'max', _]:
      return getattr(np, f'{family}imum')(*sides).astype(U)
  if family in SUMS:
    return SUMS[family](*sides).astype(U)
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
