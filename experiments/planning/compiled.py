"""The real training step, compiled for TPUs on a machine that has none: memory and collectives as they are.

Needs libtpu (the extra `tpu`), whose compiler knows the topologies; nothing runs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.build import make_program
from experiments.errors import BadInput
from experiments.kernels import check_devices, refusal
from experiments.planning.chips import Topology
from experiments.planning.exchanges import options_of
from experiments.planning.memory import memory
from experiments.planning.tensors import data_shape
from experiments.planning.traffic import moves
from experiments.planning.workload import Layout, Workload
from experiments.settings import Settings
from experiments.step import Control
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.mesh.traffic import collectives
from pallas_kernels import Unsupported

Key = tuple[str, int]
_RSS_UNIT = 1 if sys.platform == 'darwin' else 1024

LIVES = 'memory that lives at once'
GATHERS, EITHER = 'all-gather', 'gathers, as sums, and sums'
LARGE = 0.02
"""Of all bytes: collectives below are not compared, statistics and the odd permutation."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of a step on one device.

  Attributes:
    arguments: bytes of state and batch.
    temporaries: bytes of all else, beside the arguments; more than a device has is no error, for they share places.
    peak: most bytes that live at once, arguments among them; the compiler refuses a step with more than a device has.
    sent: (kind, devices that work together) -> bytes that the device sends.
    seconds: that tracing and compiling took.
    host: bytes, the most that this process has held in memory.
  """

  arguments: float
  temporaries: float
  peak: float
  sent: Mapping[Key, float]
  seconds: float
  host: float


def compile_step(settings: Settings, layout: Layout, topology: Topology) -> Compiled:
  """Compiles the step of these settings, laid out as said.

  Raises:
    BadInput: libtpu is not installed, GPUs are asked for, kernels are asked for that are not for these chips, types or
      widths, or the compiler refuses the topology or the program.
  """
  started = time.perf_counter()
  devices = described_devices(topology)
  settings = laid_out(settings, layout)
  check_devices(settings, devices)
  try:
    mesh = make_mesh(**vars(settings.mesh), devices=devices)
    program = lower(settings, mesh).compile()
  except Unsupported as error:
    raise refusal(settings, error) from error
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    reason = ' '.join(str(error).split())[:400]
    raise BadInput(f'{topology.name} does not take this step: {reason}') from error
  analysis = program.memory_analysis()
  return Compiled(
    arguments=analysis.argument_size_in_bytes,
    temporaries=analysis.temp_size_in_bytes,
    peak=analysis.peak_memory_in_bytes,
    sent=sent_by_size(program, mesh.size),
    seconds=time.perf_counter() - started,
    host=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
  )


def described_devices(topology: Topology) -> list[Any]:
  """Devices of a topology that is not there.

  Raises:
    BadInput: see `compile_step`.
  """
  if topology.chip.kind != 'tpu':
    raise BadInput(
      f'--topology={topology.name} cannot be compiled for: only TPUs can, GPUs have the analytic model alone'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise BadInput(
      "to compile for TPUs, libtpu is needed: install the extra 'tpu' (MOEJAX_EXTRAS=tpu scripts/python -V)"
    )
  # without these libtpu asks the network for the machine that it is not on
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  name = f'{topology.chip.topology}:{"x".join(map(str, topology.shape))}'
  cores = {'chip_config_name': 'megacore'} if topology.chip.topology == 'v4' else {}  # one device
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=name, **cores)
  except (ValueError, RuntimeError) as error:
    reason = ' '.join(str(error).split())[:300]
    raise BadInput(f'--topology={topology.name}: libtpu has no such topology: {reason}') from error
  return list(found.devices)


def laid_out(settings: Settings, layout: Layout) -> Settings:
  """The settings with the layout's mesh, exchange and microbatches; options stay with the exchange they are of."""
  exchange: Any = layout.exchange
  options = options_of(settings, layout)
  moe = dataclasses.replace(settings.model.moe, exchange=exchange, exchange_options=options)
  return dataclasses.replace(
    settings,
    microbatches=layout.microbatches,
    mesh=dataclasses.replace(settings.mesh, **layout.sizes),
    model=dataclasses.replace(settings.model, moe=moe),
  )


def lower(settings: Settings, mesh: Mesh) -> jax.stages.Lowered:
  """The training step, lowered for shapes with shardings."""
  program = make_program(settings, data_shape(settings), mesh)
  shape = (settings.batch_size, settings.data.sequence_length)
  rows = NamedSharding(mesh, P(BATCH_AXES))
  batch = {
    name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    for name in ('tokens', 'targets', 'segment_ids', 'positions')
  }
  batch['loss_mask'] = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows)
  one = functools.partial(jax.ShapeDtypeStruct, (), sharding=NamedSharding(mesh, P()))
  shapes: list[Any] = [one(jnp.uint32), one(jnp.float32), one(jnp.float32)]
  return program.lower(program.abstract, batch, Control(*shapes))


@dataclasses.dataclass(frozen=True)
class Comparison:
  """One predicted figure beside the compiled one, in bytes."""

  what: str
  predicted: float
  compiled: float

  @property
  def error(self) -> float:
    """Of the prediction, relative to the compiled figure."""
    return self.predicted / self.compiled - 1 if self.compiled else float('inf')


def compare(work: Workload, layout: Layout, found: Compiled) -> list[Comparison]:
  """State, all memory, and every collective that is large in one of both.

  Collectives are told apart by the number of devices that work together, not by their axes: where weights are copies
  along one axis and cut along another the compiler mixes the two. A sum counts once, whether it is scattered or whole
  on every device: `scattered` has which. TPU compilers may also write a gather as a sum of shards among zeros: where
  none is left over so many devices, gathers and sums are one. Permutations between orders of devices are not predicted.
  """
  needed = memory(work, layout)
  state = needed['parameters'] + needed['optimizer']
  rows = [
    Comparison('state', state, found.arguments),
    Comparison(LIVES, sum(needed.values()), found.peak),
  ]
  axes: dict[Key, set[str]] = {}
  for move in moves(work, layout):
    axes.setdefault((_sums(move.kind), move.size), set()).add(move.over)
  predicted, compiled = _with_sums(expected_by_size(work, layout)), _with_sums(found.sent)
  for size in {size for kind, size in predicted if kind == GATHERS}:
    if (GATHERS, size) not in compiled:
      axes[EITHER, size] = axes.get(('sums', size), set()) | axes[GATHERS, size]
      for sent in (predicted, compiled):
        both = sum(sent.pop((kind, size), 0.0) for kind in (GATHERS, 'sums'))
        sent[EITHER, size] = both
  total = sum(compiled.values())
  for key in sorted({*predicted, *compiled}, key=lambda key: -compiled.get(key, 0.0)):
    over = ', '.join(sorted(axes.get(key, ()))) or f'{key[1]} devices'
    one = Comparison(f'{key[0]} over {over}', predicted.get(key, 0.0), compiled.get(key, 0.0))
    if max(one.predicted, one.compiled) > LARGE * total and key[0] != 'collective-permute':
      rows.append(one)
  return rows


def _sums(kind: str) -> str:
  return 'sums' if kind in ('all-reduce', 'reduce-scatter') else kind


def _with_sums(sent: Mapping[Key, float]) -> dict[Key, float]:
  """Reduce-scatter and all-reduce as one: a sum on every device sends twice what a scattered one does."""
  found: dict[Key, float] = {}
  for (kind, size), value in sent.items():
    key = (_sums(kind), size)
    found[key] = found.get(key, 0.0) + (value / 2 if kind == 'all-reduce' else value)
  return found


def scattered(sent: Mapping[Key, float]) -> float:
  """Of the bytes of all sums, the part that is scattered."""
  of = {
    kind: sum(v for k, v in sent.items() if k[0] == kind)
    for kind in ('reduce-scatter', 'all-reduce')
  }
  total = of['reduce-scatter'] + of['all-reduce'] / 2
  return of['reduce-scatter'] / total if total else 0.0


def expected_by_size(work: Workload, layout: Layout) -> dict[Key, float]:
  """(kind, devices that work together) -> bytes that one device sends, as the analytic model has it."""
  found: dict[Key, float] = {}
  for move in moves(work, layout):
    found[move.kind, move.size] = found.get((move.kind, move.size), 0.0) + move.sent
  return found


def sent_by_size(program: Any, num_devices: int) -> dict[Key, float]:
  """(kind, devices that work together) -> bytes that one device sends in every step, not in branches alone."""
  found: dict[Key, float] = {}
  for one in collectives(program, num_devices):
    if one.conditional:
      continue
    key = (one.kind, max(map(len, one.groups)))
    found[key] = found.get(key, 0.0) + one.sent
  return found
