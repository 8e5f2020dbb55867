"""One kind of collective of a training step, and how often its layers run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from experiments.planning.workload import Layout, Workload
from moejax.mesh.make import BATCH_AXES


@dataclasses.dataclass(frozen=True)
class Move:
  """One kind of collective over the whole step.

  Attributes:
    kind: 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'ragged-all-to-all', or 'collective-permute' of
      gathers and sums that are taken apart.
    axes: mesh axes of the devices that work together, those of one device left out.
    size: how many devices these are.
    what: 'experts', 'heads', 'dense', 'head', 'embedding', 'router', 'tokens', 'choices', 'activations', 'logits'.
    whole: bytes of the gathered, reduced or (to all) held array, of all runs.
    part: 'inner' or 'outer' of the axes where not all of their devices work together: so many that are next to each
      other, or one of each of so many groups of these.
  """

  kind: str
  axes: tuple[str, ...]
  size: int
  what: str
  whole: float
  part: str = ''

  @property
  def over(self) -> str:
    """The axes, in words."""
    within = {'inner': ' inside of nodes', 'outer': ' between nodes'}.get(self.part, '')
    return '+'.join(self.axes) + within

  @property
  def sent(self) -> float:
    """Bytes that one device sends, by the ring algorithms."""
    return self.whole * (self.size - 1) / self.size * (2 if self.kind == 'all-reduce' else 1)


def runs(work: Workload, layout: Layout) -> tuple[int, int]:
  """How often a layer's forward pass runs in a microbatch: as a layer, and (what it stores not counted) in all.

  Microbatches are worked on twice (experiments/step.py), remat='full' runs each layer once more in the backward pass.
  """
  layers = 2 if layout.microbatches > 1 else 1
  return layers, layers + (work.settings.model.remat == 'full')


def along(layout: Layout, axes: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
  """Those of the axes that are longer than one device, and how many devices they are together."""
  used = tuple(axis for axis in axes if layout.sizes.get(axis, 1) > 1)
  return used, math.prod(layout.sizes[axis] for axis in used)


def over_fsdp_alone(layout: Layout) -> bool:
  """Whether `fsdp` is the only axis that the batch is sharded over."""
  return along(layout, BATCH_AXES)[0] in ((), ('fsdp',))


def by_kind(found: Sequence[Move]) -> Mapping[tuple[str, tuple[str, ...]], float]:
  """(kind, mesh axes) -> bytes that one device sends."""
  total: dict[tuple[str, tuple[str, ...]], float] = {}
  for move in found:
    total[move.kind, move.axes] = total.get((move.kind, move.axes), 0.0) + move.sent
  return total
