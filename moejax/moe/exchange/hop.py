"""One hop: rows travel to the devices along one mesh axis that hold their experts, and their outputs back.

`hop(x_td, rows' token and expert, ...)` is a `Trip` in four steps: rows are loaded into a buffer of fixed capacity for
each destination, sent, worked on at the other end (by experts, or in another hop), and come back. Chunks of tokens are
trips of which one is sent while another is worked on.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.moe.exchange.rows import Rows, add_up, take
from moejax.routers.capacity import rank_within
from pallas_kernels.compat import varying_axes

Inside = Callable[[Array, Array], tuple[Array, Array | None]]
"""`(x_ud, expert_u) -> (y_ud, lost_u)`: rows with their experts, numbered within the device (or node)."""


@dataclasses.dataclass(frozen=True)
class Trip:
  """The steps of a hop.

  Attributes:
    load: what is to be sent.
    send: `load -> (x_ud, expert_u)` at the other end.
    work: of the experts there.
    back: `(y_ud, lost_u) -> (y_rd, lost_r)`.
  """

  load: tuple[Array, ...]
  send: Callable[..., tuple[Array, Array]]
  work: Inside
  back: Callable[[Array, Array | None], tuple[Array, Array]]

  def __call__(self) -> tuple[Array, Array]:
    """All of them."""
    return self.back(*self.work(*self.send(*self.load)))


Hop = Callable[[Array, Rows], Trip]
"""`(x_td, rows) -> trip`."""


@dataclasses.dataclass(frozen=True)
class Line:
  """Devices that hold equal, consecutive shares of the experts.

  Attributes:
    axis: of the mesh.
    size: how many devices.
    num_experts: how many experts they hold together.
    groups: the groups of positions along the axis that exchange among themselves; None: all do.
  """

  axis: str
  size: int
  num_experts: int
  groups: tuple[tuple[int, ...], ...] | None = None

  @property
  def each(self) -> int:
    """Experts of one device."""
    return self.num_experts // self.size

  def all_to_all(self, x: Array) -> Array:
    """Part i of the first dimension goes to device i."""
    groups = None if self.groups is None else [list(group) for group in self.groups]
    return jax.lax.all_to_all(x, self.axis, 0, 0, tiled=True, axis_index_groups=groups)


def places(factor: float | int, rows: int, devices: int, most: int) -> int:
  """`ceil(factor * rows / devices)` places for a destination, at least 1 and at most `most`; factor 0: `most`."""
  if not factor:
    return most
  return min(most, max(1, math.ceil(factor * rows / devices - 1e-9)))


def hop(x_td: Array, rows: Rows, line: Line, capacity: int, inside: Inside) -> Trip:
  """Rows to their experts and back through `capacity` places for each destination.

  A destination that is full loses the rows that come last, in the order of the rows: token-major rows lose later
  tokens, never because of later ones. `y_rd` is zero for rows that were lost or have no expert.
  """
  num_rows = rows.expert.size
  owner_r = jnp.minimum(rows.expert // line.each, line.size)
  rank_r = rank_within(owner_r, line.size)
  wanted_r = owner_r < line.size
  fits_r = wanted_r & (rank_r < capacity)
  last = line.size * capacity
  place_r = jnp.where(fits_r, owner_r * capacity + rank_r, last)
  row_u = _inverse(place_r, last)
  expert_u = jnp.where(
    row_u < num_rows, rows.expert.at[row_u].get(mode='clip') % line.each, line.each
  )

  def send(x_ud, expert_u):
    return line.all_to_all(x_ud), line.all_to_all(expert_u)

  def back(y_ud, lost_u):
    y_rd = take(line.all_to_all(y_ud), place_r, row_u)
    lost_r = wanted_r & ~fits_r
    if lost_u is not None:
      back_u = line.all_to_all(lost_u.astype(jnp.int8)) > 0
      lost_r = lost_r | (fits_r & back_u.at[place_r].get(mode='clip'))
    return y_rd, lost_r

  return Trip((spread(x_td, rows, row_u, place_r), expert_u), send, inside, back)


def spread(x_td: Array, rows: Rows, row_u: Int[Array, ' U'], place_r: Int[Array, ' R']) -> Array:
  """The token of each place, zero where there is none; of token-major rows with a gather as gradient too."""
  num_rows, num_tokens = place_r.size, x_td.shape[0]
  if rows.choices:
    token_u = jnp.where(row_u < num_rows, row_u // rows.choices, num_tokens)
    return take(x_td, token_u, place_r.reshape(num_tokens, rows.choices))
  token_u = jnp.where(row_u < num_rows, rows.token.at[row_u].get(mode='clip'), num_tokens)
  return x_td.at[token_u].get(mode='fill', fill_value=0)


def _inverse(place_r: Int[Array, ' R'], num_places: int) -> Int[Array, ' U']:
  """The row of each place; R where there is none."""
  num_rows = place_r.size
  empty_u = jnp.full((num_places + 1,), num_rows, jnp.int32)
  return empty_u.at[place_r].set(jnp.arange(num_rows, dtype=jnp.int32))[:-1]


def in_chunks(x_td: Array, rows: Rows, chunks: int, one: Hop) -> tuple[Array, Array]:
  """`(y_td, lost_r)` of a hop in chunks of tokens: one is sent and another comes back beside the work on a third.

  What the compiler for TPUs makes of two chunks on four v5p, of 2,048 tokens a device or 8,192 (libtpu 0.0.42,
  tests/moe/test_schedule.py): with its option `xla_tpu_enable_async_all_to_all` (`config.compiler`) rows of the second
  chunk travel during matrix products of the first, and outputs of the first during those of the second. Only the first
  way there and the last way back are waited for. With gradients four of seven transfers stand beside products, of one
  chunk none does. Without the option an all-to-all stays in one piece, and nothing overlaps.

  Raises:
    ValueError: chunks that do not divide the tokens of a device, or rows that do not follow their tokens.
  """
  num_tokens = x_td.shape[0]
  if num_tokens % chunks or (chunks > 1 and not rows.choices):
    raise ValueError(
      f'chunks={chunks}: accepted are divisors of the {num_tokens} tokens of a device, and 1 for routers whose '
      'experts choose'
    )
  size = num_tokens // chunks
  of = [rows.part(index, chunks) for index in range(chunks)] if chunks > 1 else [rows]
  trips = [one(x_td[i * size : (i + 1) * size], part) for i, part in enumerate(of)]
  parts = []
  for part, (y_rd, lost_r) in zip(of, _interleaved(trips), strict=True):
    arrived_r = (part.expert < part.num_experts) & ~lost_r
    parts.append((add_up(y_rd, part, arrived_r, size).astype(y_rd.dtype), lost_r))
  return jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if chunks > 1 else parts[0]


def _interleaved(trips: list[Trip]) -> list[tuple[Array, Array]]:
  """What comes back of each. While one is worked on, the next one is sent and the one before comes back: both can start
  when the work starts, and have arrived when it ends. Without barriers the compiler loads a chunk when the work on the
  one before is done."""
  arrived = trips[0].send(*trips[0].load)
  found: list[tuple[Array, Array]] = []
  for trip, coming in itertools.zip_longest(trips, trips[1:]):
    arriving = None
    if coming is not None:
      arrived, load = together((arrived, coming.load))
      arriving = coming.send(*load)
    done = trip.work(*arrived)
    if len(trips) > 1:
      done, arriving, found[-1:] = together((done, arriving, found[-1:]))
    found.append(trip.back(*done))
    arrived = arriving
  return found


@jax.custom_vjp
def together(values: Any) -> Any:
  """The same arrays, none of which is used before all are made; nor are their gradients.

  Only those that vary along the same mesh axes wait for each other: a barrier makes all of its arrays vary along all.
  """
  return _tied(values)


def _tied(values: Any) -> Any:
  leaves, structure = jax.tree.flatten(values)
  alike: dict[frozenset[str], list[int]] = {}
  for index, leaf in enumerate(leaves):
    if leaf.dtype != jax.dtypes.float0:  # the gradient of integers
      alike.setdefault(varying_axes(leaf), []).append(index)
  for group in alike.values():
    tied = jax.lax.optimization_barrier([leaves[index] for index in group])
    for index, leaf in zip(group, tied, strict=True):
      leaves[index] = leaf
  return jax.tree.unflatten(structure, leaves)


together.defvjp(lambda values: (_tied(values), None), lambda _, gradients: (_tied(gradients),))
