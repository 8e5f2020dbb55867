"""The time of a step as a roofline: matrix products, memory, and each level of the network."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments.planning.chips import Level, Topology, levels
from experiments.planning.exchanges import room
from experiments.planning.memory import experts as expert_bytes
from experiments.planning.memory import heads as head_bytes
from experiments.planning.memory import moments
from experiments.planning.moves import Move, runs
from experiments.planning.traffic import moves
from experiments.planning.workload import Layout, Workload


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one step.

  Attributes:
    matmul: at the peak rate, recomputation and padded rows counted.
    memory: reading and writing device memory at its full rate.
    network: mesh axes -> seconds at the full rate of the links.
    mfu: model FLOPs (no recomputation) of the step over what the devices could do in `total`.
  """

  matmul: float
  memory: float
  network: Mapping[str, float]
  mfu: float

  @property
  def total(self) -> float:
    """Products and memory overlap each other, and the network nothing: an upper bound of the roofline."""
    return max(self.matmul, self.memory) + sum(self.network.values())

  @property
  def least(self) -> float:
    """Everything overlaps everything."""
    return max(self.matmul, self.memory, sum(self.network.values()))


def times(work: Workload, layout: Layout, topology: Topology) -> Times:
  """The terms of the roofline."""
  chip = topology.chip
  matmul = products(work, layout) / topology.devices / chip.peak
  bytes_moved = memory_bytes(work, layout)
  network: dict[str, float] = {}
  of_axis = levels(topology, dict(layout.sizes))
  for move in moves(work, layout):
    name = '+'.join(move.axes)
    network[name] = network.get(name, 0.0) + seconds(move, of_axis)
  found = Times(matmul, bytes_moved / chip.memory_rate, network, 0.0)
  mfu = work.flops / (found.total * topology.devices * chip.peak)
  return dataclasses.replace(found, mfu=mfu)


def products(work: Workload, layout: Layout) -> float:
  """FLOPs of a step on all devices: a third of the model's for each pass forward, and two for the gradients."""
  _, forward = runs(work, layout)
  wasted = 0.0
  if work.blocks and work.expert_flops:  # places without a row are padding, and worked on
    places = room(work, layout) / (work.tokens(layout) * work.choices)
    wasted = work.expert_flops * (1.5 * places - 1)
  if work.blocks and work.head_rows:
    model = work.settings.model
    tokens = work.settings.batch_size * work.settings.data.sequence_length
    rows = 3 * tokens * sum(work.shares) * work.head_rows
    wasted += 0.5 * rows * 2 * 2 * model.d_model * model.head_dim
  return (work.flops + wasted) * (forward + 2) / 3


def memory_bytes(work: Workload, layout: Layout) -> float:
  """Bytes that a device reads and writes in a step: state, weights, rows and scores of every pass."""
  model, length = work.settings.model, work.settings.data.sequence_length
  _, forward = runs(work, layout)
  tokens, parts = work.tokens(layout), layout.microbatches
  state = weights = 0.0
  others = tuple(axis for axis in layout.sizes if axis != 'fsdp')
  for tensor, elements in work.classes:
    state += (
      elements / tensor.shards(layout.sizes) * (3 + 2 * moments(work.settings.optim)) * 4
    )  # weights, moments: read and written; gradients: read
    weights += elements / tensor.shards(layout.sizes, others) * work.width * (forward + 2)
  rows = sum(expert_bytes(work, layout, *mixture) for mixture in work.mixtures)
  rows += sum(head_bytes(work, layout, share) for share in work.shares)
  # attention written out: scores and exponentials come and go, twice in the backward pass
  each = tokens * length * work.query_heads / layout.tensor * (8 + 2 * work.width)
  scores = sum(share**2 for share in work.shares) * each
  residual = sum(work.shares) * tokens * model.d_model * work.width * 12
  logits = tokens * work.vocab_size * 4 * 6
  return state + parts * (weights + (scores + residual + rows / 2) * (forward + 2) + logits)


def seconds(move: Move, of_axis: Mapping[str, tuple[Level, ...]]) -> float:
  """Inner levels first: each cuts what the next one has to carry. All-to-all sends each level what is meant for it."""
  left = move.whole * (2 if move.kind == 'all-reduce' else 1)
  found = 0.0
  steps = [level for axis in reversed(move.axes) for level in of_axis.get(axis, ())]
  if move.part:
    steps = part_of(steps, move)
  if move.kind.endswith('all-to-all'):
    size = math.prod(level.size for level in steps)
    inner = 1
    for level in steps:
      found += left * inner * (level.size - 1) / size / level.rate * _hops(level)
      inner *= level.size
    return found
  for level in steps:
    found += left * (level.size - 1) / level.size / level.rate
    left /= level.size
  return found


def part_of(steps: Sequence[Level], move: Move) -> list[Level]:
  """The levels that a part of an axis lies over: the first ones, or what these leave."""
  inner = (
    math.prod(level.size for level in steps) // move.size if move.part == 'outer' else move.size
  )
  found = []
  for level in steps:
    near = math.gcd(level.size, inner)
    inner //= near
    size = near if move.part == 'inner' else level.size // near
    stride = 1 if move.part == 'inner' else near
    if size > 1:
      found.append(dataclasses.replace(level, size=size, stride=stride))
  return found


def _hops(level: Level) -> float:
  """On a ring of n devices that sends both ways a message to everyone passes n / 4 links on average."""
  return max(1.0, level.size * level.stride / 4) if level.name == 'ici' else 1.0
