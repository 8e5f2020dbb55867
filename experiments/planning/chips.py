"""Facts of accelerators and the topologies that are made of them. All rates are of one device and one direction.

Every figure is that of a published page, whose title stands beside it; what no page was found for is called unsourced.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from experiments.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device.

  Attributes:
    kind: 'tpu' or 'gpu'.
    peak: FLOP/s of dense bfloat16 matrix products.
    memory: bytes.
    memory_rate: bytes/s of its memory.
    link: bytes/s one way of one link to a neighbour of the torus (TPU), or of all links inside the node (GPU).
    network: bytes/s one way out of the torus, or out of the node.
    dims: dimensions of the torus; of a GPU cluster 2: devices of a node, nodes.
    wraps: what a dimension must be a multiple of to close to a ring; of three dimensions, all of them.
    topology: what libtpu calls the generation in a topology name; empty of a GPU.
    source: where the figures come from.
  """

  kind: str
  peak: float
  memory: float
  memory_rate: float
  link: float
  network: float
  dims: int
  wraps: int = 0
  topology: str = ''
  source: str = ''


# Titles of what the figures are from; links of a torus are those of the book, a tenth below the nominal rate.
_BOOK = "'How to Scale Your Model' (Austin et al. 2025), chapter 2 'How to Think About TPUs': links, network"
_BASEPOD = "'DGX BasePOD: Core Components': eight ConnectX-7 of 400 Gb/s for eight GPUs"
_HOPPER = 'with sparsity 1,979 TFLOP/s, NVLink 900 GB/s both ways'


def _google(title: str) -> str:
  return f"Google Cloud documentation '{title}': peak, memory; {_BOOK}"


CHIPS: dict[str, Chip] = {
  'v4': Chip('tpu', 275e12, 32 * 2**30, 1.2e12, 45e9, 6.25e9, 3, 4, 'v4', _google('TPU v4')),
  'v5e': Chip('tpu', 197e12, 16 * 2**30, 0.819e12, 45e9, 3.125e9, 2, 16, 'v5e', _google('TPU v5e')),
  'v5p': Chip('tpu', 459e12, 95 * 2**30, 2.765e12, 90e9, 6.25e9, 3, 4, 'v5p', _google('TPU v5p')),
  'v6e': Chip('tpu', 918e12, 32 * 2**30, 1.638e12, 90e9, 12.5e9, 2, 16, 'v6e', _google('TPU v6e')),
  # one chip of 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 100 Gb/s is two devices, which share its links
  '7x': Chip(
    'tpu',
    1153.5e12,
    96 * 2**30,
    3.69e12,
    45e9,
    6.25e9,
    3,
    4,
    'tpu7x',
    _google('TPU7x (Ironwood)') + '; half a chip',
  ),
  'a100': Chip(
    'gpu',
    312e12,
    80e9,
    2.039e12,
    300e9,
    25e9,
    2,
    source="NVIDIA data sheet 'A100 80GB SXM': NVLink 600 GB/s both ways; network of 200 Gb/s a GPU: unsourced",
  ),
  'h100': Chip(
    'gpu',
    989.5e12,
    80e9,
    3.35e12,
    450e9,
    50e9,
    2,
    source=f"NVIDIA product page 'H100 Tensor Core GPU', SXM: {_HOPPER}; {_BASEPOD}",
  ),
  'h200': Chip(
    'gpu',
    989.5e12,
    141e9,
    4.8e12,
    450e9,
    50e9,
    2,
    source=f"NVIDIA product page 'H200 Tensor Core GPU', SXM: {_HOPPER}; {_BASEPOD}",
  ),
  'h800': Chip(
    'gpu',
    989.5e12,
    80e9,
    3.35e12,
    160e9,
    50e9,
    2,
    source="'DeepSeek-V3 technical report' (arXiv 2412.19437), section 3.2.2: NVLink 160 GB/s that is reached, network "
    '50 GB/s; peak and memory taken to be those of an H100: unsourced',
  ),
  'b200': Chip(
    'gpu',
    2250e12,
    180e9,
    8e12,
    900e9,
    50e9,
    2,
    source="NVIDIA data sheet 'Blackwell', HGX B200: dense peak; product page 'DGX B200': 1,440 GB, 64 TB/s, NVLink "
    "14.4 TB/s both ways of eight; 'DGX B200 user guide': eight ConnectX-7 of 400 Gb/s",
  ),
}
"""Name in a topology -> facts."""

# FLOP/s of one JAX device by the start of its device_kind; the first that fits counts. Of what no topology is made,
# the figures of Google's and NVIDIA's data sheets.
_PEAKS = (
  ('TPU v4 lite', 137e12),
  ('TPU v4', CHIPS['v4'].peak),
  ('TPU v5 lite', CHIPS['v5e'].peak),
  ('TPU v5e', CHIPS['v5e'].peak),
  ('TPU v5', CHIPS['v5p'].peak),
  ('TPU v6', CHIPS['v6e'].peak),
  ('TPU7x', CHIPS['7x'].peak),
  ('NVIDIA A100', CHIPS['a100'].peak),
  ('NVIDIA H100 PCIe', 756e12),
  ('NVIDIA H100 NVL', 835e12),
  ('NVIDIA H100', CHIPS['h100'].peak),
  ('NVIDIA H200', CHIPS['h200'].peak),
  ('NVIDIA B200', CHIPS['b200'].peak),
)


def peak_flops(device_kind: str) -> float | None:
  """bfloat16 FLOP/s of one device of `jax.Device.device_kind`; None where it is not known."""
  return next((peak for kind, peak in _PEAKS if device_kind.startswith(kind)), None)


# Slices that can be had, from the same pages of Google's documentation: of v5e and v6e their tables of 2D shapes; of
# the others a part of a cube or whole cubes ('TPU types and topologies': AxBxC, A <= B <= C, multiples of 4), with at
# most so many chips as are scheduled together ('TPU v5p': 96 cubes).
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_IN_A_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_LARGEST = {'v4': 4096, 'v5p': 6144, '7x': 9216}
_CUBE = 4**3  # chips
_NODE = 8  # GPUs
_NODES = 2**14  # more than any cluster has; the search takes them all in turn


@functools.cache
def slices(kind: str) -> tuple[tuple[int, ...], ...]:
  """The shapes of a TPU's slices, by chips."""
  if CHIPS[kind].dims == 2:
    return _FLAT
  most = _LARGEST[kind] // _CUBE
  cubes = [
    (4 * a, 4 * b, 4 * c)
    for a in range(1, math.isqrt(most) + 1)
    for b in range(a, most // a + 1)
    for c in range(b, most // (a * b) + 1)
  ]
  return tuple(sorted((*_IN_A_CUBE, *cubes), key=lambda shape: (math.prod(shape), shape)))


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices and how they hang together.

  Attributes:
    name: as given, such as 'v5p:4x4x8' or 'h100:8x16'.
    chip: of which all are.
    shape: of the torus; of GPUs (devices of a node, nodes).
    per_chip: devices at one point of the torus.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  per_chip: int = 1

  @property
  def devices(self) -> int:
    return math.prod(self.shape) * self.per_chip


def parse_topology(name: str) -> Topology:
  """The topology of a name such as 'v5p:16x16x16' or 'h100:8x16'.

  Raises:
    BadInput: a name that does not exist, with those that do.
  """
  kind, _, sizes = name.partition(':')
  if kind not in CHIPS:
    raise BadInput(f'--topology={name} is not accepted: it must be {accepted()}')
  chip = CHIPS[kind]
  shape = tuple(map(int, sizes.split('x'))) if re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', sizes) else ()
  if len(shape) != chip.dims:
    example = 'x'.join(['4'] * chip.dims) if chip.kind == 'tpu' else '8x16'
    raise BadInput(
      f'--topology={name} is not accepted: {kind} takes {chip.dims} sizes, such as {kind}:{example}'
    )
  if chip.kind == 'gpu' and shape[0] > _NODE:
    raise BadInput(
      f'--topology={name} is not accepted: the first size is the GPUs of a node, 1 to {_NODE}'
    )
  if chip.kind == 'gpu' and shape[1] > _NODES:
    raise BadInput(
      f'--topology={name} is not accepted: the second size is the nodes, 1 to {_NODES}'
    )
  if chip.kind == 'tpu' and shape not in slices(kind):
    near = ' and '.join(f'{kind}:{"x".join(map(str, one))}' for one in _nearest(kind, shape))
    raise BadInput(
      f'--topology={name} is not accepted: no slice has this shape, the nearest have {near}'
    )
  return Topology(name, chip, shape, 2 if kind == '7x' else 1)


def _nearest(kind: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
  """The slice with the most chips up to those of `shape`, and the next larger one; of equal ones the likest."""

  def unlike(one: tuple[int, ...]) -> float:
    return sum(abs(math.log(a / b)) for a, b in zip(one, sorted(shape), strict=True))

  chips = math.prod(shape)
  sizes = sorted({math.prod(one) for one in slices(kind)})
  sides = [size for size in sizes if size <= chips][-1:] + [size for size in sizes if size > chips][
    :1
  ]
  return [
    min((one for one in slices(kind) if math.prod(one) == size), key=unlike) for size in sides
  ]


def accepted() -> str:
  """What a topology may be called, for messages."""
  tpus = ', '.join(
    f'{name}:{"x".join("ABC"[: c.dims])}' for name, c in CHIPS.items() if c.kind == 'tpu'
  )
  gpus = ', '.join(f'{name}:8xNODES' for name, c in CHIPS.items() if c.kind == 'gpu')
  return f'one of {tpus} (a torus), {gpus} (GPUs of a node x nodes)'


@dataclasses.dataclass(frozen=True)
class Level:
  """One level of the network as a mesh axis sees it.

  Attributes:
    name: 'ici', 'nvlink' or 'network'.
    size: devices along the axis at this level.
    rate: bytes/s one way that a device has for a ring at this level.
    stride: links of the axis's own ring from one of them to the next.
  """

  name: str
  size: int
  rate: float
  stride: int = 1


def levels(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[Level, ...]]:
  """Mesh axis -> levels of the network, inner one first.

  The last axis lies innermost. On a torus an axis takes whole dimensions while it can: each is a ring that sends both
  ways, and one that is cut, or does not close, sends one way. Axes of size 1 have no level.

  Args:
    topology: the machine.
    sizes: mesh axis -> size, in the order of the mesh; their product is the number of devices.
  """
  chip = topology.chip
  if chip.kind == 'gpu':
    return _in_nodes(topology, sizes)
  found: dict[str, tuple[Level, ...]] = {}
  points = (*topology.shape, topology.per_chip)
  cubes = all(
    size % chip.wraps == 0 for size in topology.shape
  )  # optical switches close whole cubes alone
  rings = [cubes if chip.dims == 3 else size % chip.wraps == 0 for size in topology.shape]
  left = [(size, ring) for size, ring in zip(points, (*rings, False), strict=False) if size > 1]
  for axis, size in reversed(sizes.items()):
    rate, rest = 0.0, size
    while rest > 1 and left:
      fits = [dim for dim in left if rest % dim[0] == 0]
      part = max(math.gcd(size, rest) for size, _ in fits or left)
      if part == 1:
        break
      whole = next(dim for dim in fits or left if math.gcd(dim[0], rest) == part)
      left.remove(whole)
      if part < whole[0]:
        left.append((whole[0] // part, False))
      rate += chip.link * (2 if part == whole[0] and whole[1] else 1)
      rest //= part
    if size > 1:
      found[axis] = (Level('ici', size, rate or chip.link),)
  return found


def _in_nodes(topology: Topology, sizes: dict[str, int]) -> dict[str, tuple[Level, ...]]:
  found: dict[str, tuple[Level, ...]] = {}
  inside = topology.shape[0]
  for axis, size in reversed(sizes.items()):
    near = math.gcd(inside, size)
    inside //= near
    parts = [
      Level('nvlink', near, topology.chip.link),
      Level('network', size // near, topology.chip.network),
    ]
    if size > 1:
      found[axis] = tuple(level for level in parts if level.size > 1)
  return found
