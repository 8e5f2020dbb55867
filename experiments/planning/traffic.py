"""Bytes between devices in one training step, by collective and mesh axes: the analytic model.

What it says is what the compiled step was seen to do (tests/experiments/planning/test_compiled.py): a layer's weights
are gathered over `fsdp` in the type of the computation each time the layer runs, their gradients are reduced in each
microbatch, the embedding's in float32, as a whole table or token by token.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping

from experiments.planning.workload import BATCH_AXES, Layout, Workload

FUSED = 4
"""Up to so many devices the TPU compiler makes one reduce-scatter of the head's gradient, a sum that is cut afterwards.
Above, it is summed on every device, and twice as much travels."""


@dataclasses.dataclass(frozen=True)
class Move:
  """One kind of collective over the whole step.

  Attributes:
    kind: 'all-gather', 'reduce-scatter', 'all-reduce' or 'all-to-all'.
    axes: mesh axes of the devices that work together, those of one device left out.
    size: how many devices these are.
    what: 'experts', 'dense', 'head', 'embedding', 'router', 'tokens', 'choices', 'activations'.
    whole: bytes of the gathered, reduced or (all-to-all) held array, of all runs.
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  what: str
  whole: float

  @property
  def sent(self) -> float:
    """Bytes that one device sends, by the ring algorithms."""
    return self.whole * (self.size - 1) / self.size * (2 if self.kind == 'all-reduce' else 1)


def moves(work: Workload, layout: Layout) -> list[Move]:
  """Every collective that carries more than statistics."""
  found = [*_weights(work, layout)]
  if work.settings.model.moe_layers:
    found += _exchange(work, layout)
  if layout.tensor > 1:
    found += _tensor_parallel(work, layout)
  return [move for move in found if move.size > 1 and move.whole]


def runs(work: Workload, layout: Layout) -> tuple[int, int]:
  """How often a layer's forward pass runs in a microbatch: as a layer, and (what it stores not counted) in all.

  Microbatches are worked on twice (experiments/step.py), remat='full' runs each layer once more in the backward pass.
  """
  layers = 2 if layout.microbatches > 1 else 1
  return layers, layers + (work.settings.model.remat == 'full')


def _along(layout: Layout, axes: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
  used = tuple(axis for axis in axes if layout.sizes.get(axis, 1) > 1)
  return used, math.prod(layout.sizes[axis] for axis in used)


def _weights(work: Workload, layout: Layout) -> Iterator[Move]:
  """Gathers of weights and sums of gradients."""
  layers, forward = runs(work, layout)
  parts = layout.microbatches
  # dense weights are gathered for the recomputed pass and again for the backward one, experts once for both
  gathers = {
    'dense': forward + 1,
    'router': forward + 1,
    'experts': layers + 1,
    'head': layers,
  }
  fsdp, fsdp_size = _along(layout, ('fsdp',))
  for tensor, elements in work.classes:
    if not tensor.trained:
      continue
    kept = tensor.shards(layout.sizes, tuple(axis for axis in layout.sizes if axis != 'fsdp'))
    whole = elements / kept  # of the layers' weights while they are worked with
    sharded = tensor.shards(layout.sizes, ('fsdp',))
    over = {axis for axes in tensor.axes for axis in axes}
    others, size = _along(layout, tuple(axis for axis in BATCH_AXES if axis not in over))
    what = tensor.group
    if what == 'embedding':
      yield from _embedding(work, layout, elements)
      continue
    if sharded > 1:
      yield Move('all-gather', fsdp, fsdp_size, what, parts * gathers[what] * whole * work.width)
    width = work.width if what in ('dense', 'experts') else 4
    if sharded > 1:
      kind = 'all-reduce' if what == 'head' and fsdp_size > FUSED else 'reduce-scatter'
      yield Move(kind, fsdp, fsdp_size, what, parts * whole * width)
    # sums of the head over other axes wait for the end of the step
    times = 1 if what == 'head' else parts
    yield Move('all-reduce', others, size, what, times * whole / sharded * width)


def _embedding(work: Workload, layout: Layout, elements: int) -> Iterator[Move]:
  """Sums of its gradient. What looking rows up moves is a layer's tokens once, and left out."""
  parts, table = layout.microbatches, elements / layout.tensor * 4
  axes, size = _along(layout, BATCH_AXES)
  fsdp, fsdp_size = _along(layout, ('fsdp',))
  if work.sums_table(layout):
    yield Move('all-reduce', axes, size, 'embedding', parts * table)
    if parts > 1:  # the sum over microbatches is sharded
      yield Move('all-gather', fsdp, fsdp_size, 'embedding', parts * table)
    return
  tokens = work.tokens(layout) * size * work.settings.model.d_model / layout.tensor * 4
  yield Move('all-gather', axes, size, 'embedding', parts * tokens)
  # devices that share a shard of the table have added the tokens of their fsdp group alone
  others, size = _along(layout, tuple(axis for axis in BATCH_AXES if axis != 'fsdp'))
  yield Move('all-reduce', others, size, 'embedding', table / fsdp_size)


def _exchange(work: Workload, layout: Layout) -> Iterator[Move]:
  """Tokens to experts and back."""
  if layout.expert == 1:
    return
  model = work.settings.model
  _, forward = runs(work, layout)
  layers, _ = runs(work, layout)
  times = layout.microbatches * len(model.moe_layers)
  tokens = work.tokens(layout)
  expert, size = _along(layout, ('expert',))
  there, back = (
    forward + 1,
    layers + 1,
  )  # what comes back is not computed again; gradients go both ways
  if layout.exchange == 'all_gather':
    whole = tokens * size * model.d_model * work.width / layout.tensor
    yield Move('all-gather', expert, size, 'tokens', times * there * whole)
    yield Move('reduce-scatter', expert, size, 'tokens', times * back * whole)
    rows = tokens * size * work.choices * 4
    yield Move('all-gather', expert, size, 'choices', times * forward * 2 * rows)
    yield Move('reduce-scatter', expert, size, 'choices', times * rows)
  else:
    held = tokens * work.choices * model.d_model * work.width / layout.tensor
    yield Move('all-to-all', expert, size, 'tokens', times * (there + back) * held)


def _tensor_parallel(work: Workload, layout: Layout) -> Iterator[Move]:
  """Sums of what attention and feed-forward layers write, whose hidden widths are cut."""
  _, forward = runs(work, layout)
  whole = work.tokens(layout) * work.settings.model.d_model * work.width
  times = layout.microbatches * work.settings.model.num_layers * 2 * (forward + 1)
  axes, size = _along(layout, ('tensor',))
  yield Move('all-reduce', axes, size, 'activations', times * whole)


def by_kind(found: list[Move]) -> Mapping[tuple[str, tuple[str, ...]], float]:
  """(kind, mesh axes) -> bytes that one device sends."""
  total: dict[tuple[str, tuple[str, ...]], float] = {}
  for move in found:
    total[move.kind, move.axes] = total.get((move.kind, move.axes), 0.0) + move.sent
  return total
