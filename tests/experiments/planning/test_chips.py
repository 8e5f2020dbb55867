import math

import pytest

from experiments.errors import BadInput
from experiments.planning.chips import CHIPS, Level, levels, parse_topology, peak_flops


def test_a_topology_is_its_chip_and_its_sizes():
  pod, cluster = parse_topology('v5p:4x4x8'), parse_topology('h100:8x16')
  assert (pod.devices, cluster.devices) == (128, 128)
  assert pod.chip is CHIPS['v5p']
  assert parse_topology('7x:2x2x2').devices == 16  # two devices a chip


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v7x:2x2x2', 'must be one of v4:AxBxC, v5e:AxB, v5p:AxBxC, v6e:AxB, 7x:AxBxC'),
    ('v5p', 'v5p takes 3 sizes, such as v5p:4x4x4'),
    ('v5e:4x4x4', 'v5e takes 2 sizes, such as v5e:4x4'),
    ('v5p:4x0x4', 'v5p takes 3 sizes'),
    ('h100:16x8', 'the GPUs of a node, 1 to 8'),
    ('h100:8x999999999', 'the second size is the nodes, 1 to 16384$'),
    ('v5e:32x16', 'no slice has this shape, the nearest have v5e:16x16$'),
    ('v5e:3x5', 'the nearest have v5e:2x4 and v5e:4x4$'),
    ('v6e:16x8', 'the nearest have v6e:8x16 and v6e:16x16$'),
    ('v5p:3x5x7', 'the nearest have v5p:4x4x4 and v5p:4x4x8$'),
    ('v4:1x1x1', 'the nearest have v4:2x2x1$'),
    ('v5p:8x4x4', 'the nearest have v5p:4x4x8 and v5p:4x4x12$'),
    ('v5p:16x16x28', 'the nearest have v5p:16x16x24$'),
  ],
)
def test_a_topology_that_does_not_exist_is_answered_with_those_that_do(name, message):
  with pytest.raises(BadInput, match=message):
    parse_topology(name)


# Google Cloud documentation 'TPU v5p', table of slice shapes
V5P = '2x2x1 2x2x2 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16 16x16x24'


@pytest.mark.parametrize('shape', V5P.split())
def test_a_published_slice_is_accepted(shape):
  assert parse_topology(f'v5p:{shape}').devices == math.prod(map(int, shape.split('x')))


def test_an_axis_along_whole_rings_has_both_directions_of_each():
  pod = parse_topology('v5p:4x4x8')
  found = levels(pod, {'data': 1, 'fsdp': 16, 'expert': 8})
  link = CHIPS['v5p'].link
  assert found == {'expert': (Level('ici', 8, 2 * link),), 'fsdp': (Level('ici', 16, 4 * link),)}


def test_an_axis_along_a_part_of_a_dimension_has_one_direction():
  found = levels(parse_topology('v5p:4x4x4'), {'data': 1, 'fsdp': 32, 'expert': 2})
  link = CHIPS['v5p'].link
  assert found['expert'] == (Level('ici', 2, link),)
  assert found['fsdp'] == (Level('ici', 32, 5 * link),)  # two rings, and half a dimension
  # a slice of v5p that is not made of whole cubes of 4x4x4 has no rings, a row of v5e that is whole has
  open_ends = levels(parse_topology('v5p:2x2x4'), {'data': 1, 'fsdp': 4, 'expert': 4})
  assert open_ends['expert'][0].rate == link
  row = levels(parse_topology('v5e:8x16'), {'data': 1, 'fsdp': 8, 'expert': 16})
  assert row['expert'][0].rate == 2 * CHIPS['v5e'].link
  small = levels(parse_topology('v5e:4x4'), {'data': 1, 'fsdp': 4, 'expert': 4})
  assert small['expert'][0].rate == CHIPS['v5e'].link  # 4 is no ring on v5e


def test_gpus_of_a_node_come_first_and_the_network_after_them():
  chip = CHIPS['h100']
  found = levels(parse_topology('h100:8x4'), {'data': 2, 'fsdp': 4, 'expert': 4})
  assert found == {
    'expert': (Level('nvlink', 4, chip.link),),
    'fsdp': (Level('nvlink', 2, chip.link), Level('network', 2, chip.network)),
    'data': (Level('network', 2, chip.network),),
  }


# Google Cloud documentation 'TPU7x (Ironwood)', which compares it to v5p and v6e: TFLOP/s (bfloat16), GiB, GB/s, ICI in
# GB/s both ways of all links, data center network in Gb/s; 'TPU v5e', network of a pod 6.4 Tb/s over 256 chips
PUBLISHED = {
  'v5e': (197, 16, 819, 400, 25),
  'v5p': (459, 95, 2765, 1200, 50),
  'v6e': (918, 32, 1638, 800, 100),
  '7x': (2307, 192, 7380, 1200, 100),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_tpu_has_the_published_figures(name):
  peak, memory, rate, ici, network = PUBLISHED[name]
  chip, parts = CHIPS[name], 2 if name == '7x' else 1
  assert chip.peak * parts == peak * 1e12
  assert chip.memory * parts == memory * 2**30
  assert chip.memory_rate * parts == rate * 1e9
  assert chip.network * parts == network * 1e9 / 8
  # what a link reaches is 90 % of the nominal rate
  assert chip.link * parts == 0.9 * ici * 1e9 / (2 * 2 * chip.dims)


# NVIDIA: TFLOP/s with sparsity (bfloat16), GB, GB/s, NVLink in GB/s both ways, network in Gb/s
SXM = {
  'a100': (624, 80, 2039, 600, 200),
  'h100': (1979, 80, 3350, 900, 400),
  'h200': (1979, 141, 4800, 900, 400),
  'b200': (4500, 1440 / 8, 64_000 / 8, 14_400 / 8, 400),
}


@pytest.mark.parametrize('name', SXM)
def test_a_gpu_has_the_published_figures(name):
  chip = CHIPS[name]
  found = (2 * chip.peak / 1e12, chip.memory / 1e9, chip.memory_rate / 1e9)
  assert (*found, 2 * chip.link / 1e9, 8 * chip.network / 1e9) == SXM[name]


def test_a_chip_has_a_source_and_a_faster_memory_than_network():
  for chip in CHIPS.values():
    assert chip.source
    assert chip.network < chip.link < chip.memory_rate < chip.peak


@pytest.mark.parametrize(
  'kind, teraflops',
  [
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5e', 197),
    ('TPU v5', 459),
    ('TPU v5p', 459),
    ('TPU v6 lite', 918),
    ('TPU v6e', 918),
    ('TPU7x', 1153.5),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA H100 80GB HBM3', 989.5),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989.5),
    ('NVIDIA B200', 2250),
  ],
)
def test_peaks_by_device_kind(kind, teraflops):
  assert peak_flops(kind) == teraflops * 1e12


@pytest.mark.parametrize('kind', ['cpu', '', 'NVIDIA L4', 'TPU v9'])
def test_an_unknown_device_has_no_peak(kind):
  assert peak_flops(kind) is None
