"""Bytes between devices in one training step, by collective and mesh axes: the analytic model.

What it says is what the compiled step was seen to do (tests/experiments/planning/test_compiled.py): a layer's weights
are gathered over `fsdp` in the type of the computation each time the layer runs, their gradients are reduced in each
microbatch, the embedding's in float32, as a whole table or token by token.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.planning.moves import Move, along, over_fsdp_alone, runs
from experiments.planning.rows import exchange, tensor_parallel
from experiments.planning.workload import Layout, Workload
from moejax.mesh.make import BATCH_AXES

FUSED = 4
"""Up to so many devices the TPU compiler makes a reduce-scatter of a sum that is cut afterwards. Above, it may sum on
every device, and twice as much travels: it is taken to do so with experts, head and table, as most steps did."""


def moves(work: Workload, layout: Layout) -> list[Move]:
  """Every collective that carries more than statistics."""
  found = [*_weights(work, layout), *tensor_parallel(work, layout)]
  if work.settings.model.moe_layers:
    found += exchange(work, layout)
  return [move for move in found if move.size > 1 and move.whole]


def _weights(work: Workload, layout: Layout) -> Iterator[Move]:
  """Gathers of weights and sums of gradients."""
  layers, forward = runs(work, layout)
  parts = layout.microbatches
  # dense weights are gathered for the recomputed pass and again for the backward one, experts once for both
  gathers = {
    'dense': forward + 1,
    'router': forward + 1,
    'experts': layers + 1,
    'heads': layers + 1,
    'head': layers,
  }
  fsdp, fsdp_size = along(layout, ('fsdp',))
  for tensor, elements in work.classes:
    if not tensor.trained:
      continue
    kept = tensor.shards(layout.sizes, tuple(axis for axis in layout.sizes if axis != 'fsdp'))
    whole = elements / kept  # of the layers' weights while they are worked with
    sharded = tensor.shards(layout.sizes, ('fsdp',))
    over = {axis for axes in tensor.axes for axis in axes}
    others, size = along(layout, tuple(axis for axis in BATCH_AXES if axis not in over))
    what = tensor.group
    if what == 'experts' and layout.exchange == 'local':
      whole *= (
        layout.expert
      )  # and are gathered along the axis `expert` first, shards of `fsdp` alone
      own, size_of_own = along(layout, ('expert',))
      part = whole / sharded * work.width
      yield Move('all-gather', own, size_of_own, what, parts * gathers[what] * part)
      yield Move('reduce-scatter', own, size_of_own, what, parts * part)
    if what == 'embedding':
      yield from _embedding(work, layout, elements)
      continue
    if sharded > 1 and layout.tensor > 1 and what == 'head':
      yield from _head_beside_tensor(work, layout, elements, gathers[what])
      continue
    if sharded > 1:
      yield Move('all-gather', fsdp, fsdp_size, what, parts * gathers[what] * whole * work.width)
    width = work.width if what in ('dense', 'experts', 'heads') else 4
    if sharded > 1:
      kind = 'all-reduce' if what != 'dense' and fsdp_size > FUSED else 'reduce-scatter'
      yield Move(kind, fsdp, fsdp_size, what, parts * whole * width)
    # sums of the head over other axes wait for the end of the step
    times = 1 if what == 'head' else parts
    yield Move('all-reduce', others, size, what, times * whole / sharded * width)


def _embedding(work: Workload, layout: Layout, elements: int) -> Iterator[Move]:
  """Sums of its gradient. What looking rows up moves is a layer's tokens once, and left out."""
  parts, table = layout.microbatches, elements * 4
  axes, size = along(layout, BATCH_AXES)
  fsdp, fsdp_size = along(layout, ('fsdp',))
  if work.sums_table(layout):
    alone = over_fsdp_alone(layout)
    if alone and size > FUSED:  # every device gets all tokens in its part of the model width
      tokens = parts * work.tokens(layout) * work.settings.model.d_model * 4
      yield Move('all-to-all', axes, size, 'embedding', tokens)
      return
    kind = 'reduce-scatter' if alone else 'all-reduce'
    yield Move(kind, axes, size, 'embedding', parts * table)
    if parts > 1:  # the sum over microbatches is sharded
      part = max(1, fsdp_size // layout.tensor)  # as far as tokens are cut by model width
      yield Move('all-gather', fsdp, part, 'embedding', parts * table / layout.tensor)
    return
  tokens = work.tokens(layout) * size * work.settings.model.d_model * 4
  yield Move('all-gather', axes, size, 'embedding', parts * tokens)
  # devices that share a shard of the table have added the tokens of their fsdp group alone
  others, size = along(layout, tuple(axis for axis in BATCH_AXES if axis != 'fsdp'))
  yield Move('all-reduce', others, size, 'embedding', table / fsdp_size)


def _head_beside_tensor(
  work: Workload, layout: Layout, elements: int, gathers: int
) -> Iterator[Move]:
  """The head is not cut over `tensor`, between tokens that are by model width.

  It is gathered as far as the tokens are cut, and its gradient summed in each microbatch.
  """
  parts, fsdp = layout.microbatches, layout.sizes['fsdp']
  gathered = parts * gathers * elements * work.width
  if over_fsdp_alone(layout):
    yield Move('all-gather', ('fsdp',), fsdp, 'head', gathered)
  else:
    part = max(1, fsdp // layout.tensor)
    yield Move('all-gather', ('fsdp',), part, 'head', gathered / layout.tensor)
  axes, size = along(layout, BATCH_AXES)
  cut = parts > 1 or over_fsdp_alone(layout) or fsdp == layout.tensor
  whole = elements / layout.tensor if cut else elements
  yield Move('all-reduce', axes, size, 'head', parts * whole * 4)
