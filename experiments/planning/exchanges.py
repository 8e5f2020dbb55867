"""What each exchange has room for and sends: shapes know no loads, so all of it is known beforehand.

Options are those of the config where it names the exchange, and what a layout adds: the nodes of a two-level exchange,
which the search takes from the machine. The exchanges themselves are in moejax/moe/exchange.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from experiments.planning.workload import Layout, Workload
from experiments.settings import Settings
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.exchange import make_exchange
from moejax.moe.exchange.all_to_all import AllToAll
from moejax.moe.exchange.bilevel import Bilevel
from moejax.moe.exchange.ragged import RaggedAllToAll
from moejax.moe.exchange.sparse_fsdp import SparseFSDP

LANES = 128
"""A ragged exchange on a TPU sends an integer as a row of so many."""

FALLBACK_BUFFER = 1.5
"""Default of `ragged_fallback`."""

DEFAULTS: dict[str, dict[str, Any]] = {
  'all_to_all': {'capacity_factor': AllToAll.capacity_factor},
  'bilevel': {'nodes': Bilevel.nodes, 'capacity_factor': Bilevel.capacity_factor},
  'ragged_all_to_all': {'buffer_factor': RaggedAllToAll.buffer_factor},
  'ragged_fallback': {'buffer_factor': FALLBACK_BUFFER},
  'sparse_fsdp': {'hot': SparseFSDP.hot, 'capacity_factor': SparseFSDP.capacity_factor},
}
"""Exchange -> its options that decide sizes, with their defaults."""


def options_of(settings: Settings, layout: Layout) -> dict[str, Any]:
  """Those of the settings where these name the layout's exchange, and the layout's own."""
  moe = settings.model.moe
  given = moe.exchange_options if moe.exchange == layout.exchange else {}
  return {**given, **layout.options}


def sizes_of(settings: Settings, layout: Layout) -> dict[str, Any]:
  """Every option that decides sizes, defaults among them."""
  return {**DEFAULTS.get(layout.exchange, {}), **options_of(settings, layout)}


def check_options(settings: Settings, layout: Layout) -> None:
  """Refuses what the exchange would refuse on this mesh.

  Raises:
    ValueError: an option that the exchange does not take, or a value out of its range.
  """
  options, size = options_of(settings, layout), layout.expert
  alone = make_mesh(devices=jax.devices()[:1])
  # The devices of the plan need not be those of this machine.
  here = {key: options[key] for key in options if key not in ('nodes', 'kernel')}
  make_exchange(layout.exchange, alone, BATCH_AXES, here)
  found = sizes_of(settings, layout)
  if layout.exchange == 'bilevel' and (found['nodes'] < 1 or size % found['nodes']):
    raise ValueError(f'nodes={found["nodes"]} does not divide mesh axis expert={size}')
  model = settings.model
  each = min(model.moe_experts, default=1) * model.moe.granularity // size  # of the narrowest layer
  if layout.exchange == 'sparse_fsdp' and found['hot'] > each:
    raise ValueError(f'hot={found["hot"]}: accepted are 1 to {each}, the experts of a device')


@dataclasses.dataclass(frozen=True)
class Hop:
  """Rows to other devices along the expert axis, and their outputs back.

  Attributes:
    kind: of the collective.
    size: devices that work together.
    sent: rows that a device sends, those that stay with it counted.
    places: rows that a device has room for at the other end.
    number: bytes that go with a row, once: of which expert it is, and whether there was room for it later on.
    part: 'inner' where these devices are next to each other and 'outer' where they are not; '' where they are all.
  """

  kind: str
  size: int
  sent: float
  places: float
  number: float
  part: str = ''


def hops(work: Workload, layout: Layout) -> list[Hop]:
  """The way of one microbatch's rows to their experts, of exchanges that send rows.

  What a fallback sends is left out: it does in steps alone in which rows found no place.
  """
  rows, size = work.tokens(layout) * work.choices, layout.expert
  if size == 1:
    return []
  options = sizes_of(work.settings, layout)
  if layout.exchange in ('all_to_all', 'sparse_fsdp'):
    places = rows * _places(options['capacity_factor'], size)
    return [Hop('all-to-all', size, places, places, 4)]
  if layout.exchange in ('ragged_all_to_all', 'ragged_fallback'):
    places = rows * _places(options['buffer_factor'], size)
    return [Hop('ragged-all-to-all', size, min(rows, places), places, LANES * 4)]
  if layout.exchange == 'bilevel':
    nodes, factor = options['nodes'], options['capacity_factor']
    near = size // nodes
    first = rows * _places(factor, nodes)
    second = min(rows * factor or near * first, near * first)
    there = Hop('all-to-all', nodes, first, first, 4 + 1, 'outer' if near > 1 else '')
    inside = Hop('all-to-all', near, second, second, 4, 'inner' if nodes > 1 else '')
    return [there, inside]
  return []


def _places(factor: float, devices: int) -> float:
  """Rows of a buffer over those of one device; 0 is room for everything."""
  return min(factor or devices, devices)


@dataclasses.dataclass(frozen=True)
class Rows:
  """Places for rows that a device works on with one set of experts.

  Attributes:
    places: of one microbatch.
    experts: how many of a layer the device works with.
    copies: whether these are copies of other devices' experts.
  """

  places: float
  experts: float
  copies: bool = False


def worked_on(work: Workload, layout: Layout, num_experts: int = 0) -> list[Rows]:
  """What the experts of a device have places for, of one microbatch, in a layer of so many (0: the most there are)."""
  moe = work.settings.model.moe
  rows = work.tokens(layout) * work.choices
  own = (num_experts or moe.num_experts * moe.granularity) / layout.expert
  if layout.exchange == 'local' or layout.expert == 1:
    return [Rows(rows, own * layout.expert)]
  if layout.exchange == 'all_gather':
    return [Rows(rows * layout.expert, own)]
  found = [Rows(hops(work, layout)[-1].places, own)]
  if layout.exchange == 'sparse_fsdp':  # any row may be of a hot expert, or none
    found.append(Rows(rows, hot(work, layout), copies=True))
  return found


def room(work: Workload, layout: Layout) -> float:
  """Rows that a device has room for, of one microbatch."""
  return sum(rows.places for rows in worked_on(work, layout))


def hot(work: Workload, layout: Layout) -> int:
  """Experts of a layer that every device has a copy of."""
  if layout.exchange != 'sparse_fsdp':
    return 0
  number: int = sizes_of(work.settings, layout)['hot']
  return number * layout.expert
