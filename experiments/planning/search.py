"""All layouts of a step on a topology that fit, the fastest first; or by how much the memory is exceeded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from experiments.errors import BadInput
from experiments.make_model import exchange_name
from experiments.mixtures import router_facts
from experiments.planning.chips import Topology, levels
from experiments.planning.exchanges import check_options, options_of
from experiments.planning.memory import GROUPS, Memory, memory
from experiments.planning.roofline import Times, times
from experiments.planning.workload import EXCHANGES, Layout, Workload
from experiments.settings import Settings
from moejax.mesh.make import AXES, BATCH_AXES

_NAMED = ('sparse_fsdp',)
"""Exchanges that are planned for where the config names them alone: what they lose depends on loads and options."""

USABLE = 0.95
"""Of a device's memory: the rest is the runtime's, and fragments."""


@dataclasses.dataclass(frozen=True)
class Plan:
  """A layout with what it costs."""

  layout: Layout
  memory: Memory
  times: Times

  @property
  def bytes(self) -> float:
    return sum(self.memory.values())


def search(work: Workload, topology: Topology) -> list[Plan]:
  """Every mesh and exchange that fits, each with the fewest microbatches that do, the fastest first.

  Raises:
    BadInput: none fits, with what the one that needs least exceeds; or no mesh takes the batch or the experts.
  """
  room = topology.chip.memory * USABLE
  plans, smallest, needs = [], None, math.inf
  for options in _by_mesh(work, topology):
    for layout in options:
      found = memory(work, layout)
      total = sum(found.values())
      if total < needs:
        smallest, needs = layout, total
      if total <= room:
        plans.append(Plan(layout, found, times(work, layout, topology)))
        break
  if plans:
    return sorted(plans, key=lambda plan: plan.times.total)
  if smallest is None:
    raise BadInput(
      f'batch_size={work.settings.batch_size} divides over no mesh of the {topology.devices} devices of '
      f'{topology.name} with which the parameters divide: a multiple of {topology.devices} does for most'
    )
  raise BadInput(
    _too_small('the layout that needs least', smallest, memory(work, smallest), topology)
  )


def plan_of(work: Workload, layout: Layout, topology: Topology) -> Plan:
  """One layout, whether it is the fastest or not.

  Raises:
    BadInput: it does not fit, or does not divide.
  """
  per_part = work.settings.batch_size // layout.microbatches
  if per_part % layout.batch_shards:
    raise BadInput(
      f'batch_size={work.settings.batch_size} in microbatches={layout.microbatches} of {per_part} does not divide over '
      f'the {layout.batch_shards} shards of the batch'
    )
  if layout.tensor > 1 and work.head_rows:
    raise BadInput(
      f'model.attention={work.settings.model.attention!r} over mesh axis tensor={layout.tensor} is not planned for: '
      'accepted is tensor=1'
    )
  if heads(work) % layout.tensor:
    raise BadInput(
      f'{heads(work)} heads of keys do not divide over mesh axis tensor={layout.tensor}'
    )
  for tensor in work.tensors:
    if not tensor.divides(layout.sizes):
      raise BadInput(
        f'{tensor.path} of shape {tensor.shape} does not divide over the mesh {describe(layout)}'
      )
  found = memory(work, layout)
  if sum(found.values()) > topology.chip.memory * USABLE:
    raise BadInput(_too_small('this layout', layout, found, topology))
  return Plan(layout, found, times(work, layout, topology))


def own_layout(settings: Settings, devices: int) -> Layout:
  """The layout that the config itself names.

  Raises:
    BadInput: axes that do not make the number of devices, or an option that the exchange does not take.
  """
  given = dict(vars(settings.mesh))
  product = math.prod(size for size in given.values() if size != -1)
  sizes = {axis: devices // product if size == -1 else size for axis, size in given.items()}
  if math.prod(sizes.values()) != devices:
    axes = ' '.join(f'{axis}={size}' for axis, size in given.items())
    raise BadInput(f'mesh {axes} does not fit {devices} devices')
  name = exchange_name(settings, sizes['expert']) if settings.model.moe_layers else 'local'
  layout = Layout({axis: sizes[axis] for axis in AXES}, name, settings.microbatches)
  try:
    check_options(settings, layout)
  except ValueError as error:
    raise BadInput(f'model.moe: {error}') from error
  return layout


def _too_small(which: str, layout: Layout, found: Memory, topology: Topology) -> str:
  room, total = topology.chip.memory * USABLE, sum(found.values())
  groups = ', '.join(f'{name} {found[name] / 2**30:.1f}' for name in GROUPS)
  return (
    f'{topology.name} is too small by {(total - room) / 2**30:.1f} GiB a device: {which} '
    f'({describe(layout)}) takes {total / 2**30:.1f} GiB ({groups}) of the {room / 2**30:.1f} GiB there are'
  )


def describe(layout: Layout) -> str:
  """'fsdp=16 expert=4, all_gather, microbatches=4'."""
  axes = ' '.join(f'{axis}={size}' for axis, size in layout.sizes.items() if size > 1)
  options = ''.join(f' {name}={value}' for name, value in layout.options.items())
  return f'{axes or "data=1"}, {layout.exchange}{options}, microbatches={layout.microbatches}'


def _by_mesh(work: Workload, topology: Topology) -> Iterator[list[Layout]]:
  """For every mesh and exchange the layouts by number of microbatches, ascending."""
  batch, model = work.settings.batch_size, work.settings.model
  stays = not model.moe_layers or router_facts(model).flags.stays_in_sequence
  for sizes in meshes(topology.devices):
    if not _divides(work, sizes):
      continue
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    if batch % shards:
      continue
    most = batch // shards
    parts = [part for part in range(1, most + 1) if most % part == 0]
    if sizes['expert'] == 1:
      found = [Layout(sizes, 'local', 1)] if stays else []
    else:
      found = list(_exchanges(work.settings, topology, sizes)) if model.moe_layers else []
    for layout in found:
      yield [dataclasses.replace(layout, microbatches=part) for part in parts]


def _exchanges(settings: Settings, topology: Topology, sizes: dict[str, int]) -> Iterator[Layout]:
  """A layout of one microbatch for every exchange between owners of experts that the search may choose on this mesh.

  These compute the same function; one that loses rows by its own choice of experts is among them where the config names
  it. Two levels are for an axis that lies over two levels of the machine, or where the config names them.
  """
  for name in EXCHANGES:
    own = settings.model.moe.exchange == name
    if name == 'local' or (name in _NAMED and not own):
      continue
    layout = Layout(sizes, name, 1)
    if name == 'bilevel' and 'nodes' not in options_of(settings, layout):
      steps = levels(topology, sizes)['expert']
      if len(steps) < 2 and not own:
        continue
      layout = dataclasses.replace(layout, options={'nodes': math.prod(s.size for s in steps[1:])})
    try:
      check_options(settings, layout)
    except ValueError:
      continue  # of another mesh; the config's own is refused with a sentence
    yield layout


def meshes(devices: int) -> Iterator[dict[str, int]]:
  """Every way to cut the devices over the mesh axes. `tensor` stays within 8: it talks in every layer."""

  def cut(axes: tuple[str, ...], left: int) -> Iterator[dict[str, int]]:
    if len(axes) == 1:
      yield {axes[0]: left}
      return
    for size in range(1, left + 1):
      if left % size == 0 and (axes[0] != 'tensor' or size <= 8):
        for rest in cut(axes[1:], left // size):
          yield {axes[0]: size, **rest}

  for sizes in cut(tuple(sorted(AXES, key=lambda axis: axis != 'tensor')), devices):
    yield {axis: sizes[axis] for axis in AXES}


def heads(work: Workload) -> int:
  """Heads that `tensor` cuts: those of keys and values."""
  model = work.settings.model
  return model.num_heads if model.attention == 'latent' else model.num_kv_heads


def _divides(work: Workload, sizes: dict[str, int]) -> bool:
  cut = any('tensor' in axes for tensor in work.tensors for axes in tensor.axes)
  if sizes.get('tensor', 1) > 1 and (work.head_rows or not cut):
    return False  # heads that are experts are not planned for there, or no rule uses the axis
  if heads(work) % sizes.get('tensor', 1):
    return False
  return all(tensor.divides(sizes) for tensor in work.tensors)
