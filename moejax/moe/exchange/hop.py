"""One hop: rows travel to the devices along one mesh axis that hold their experts, and their outputs back.

`hop(x_td, rows' token and expert, ...) -> (y_rd, lost_r)` is made of `send`, places in a buffer of fixed capacity per
destination, and `inside`, what happens to the rows at the other end: the experts' work, or another hop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from moejax.moe.exchange.rows import Rows, add_up, take
from moejax.routers.capacity import rank_within

Inside = Callable[[Array, Array], tuple[Array, Array | None]]
"""`(x_ud, expert_u) -> (y_ud, lost_u)`: rows with their experts, numbered within the device (or node)."""

Hop = Callable[[Array, Rows], tuple[Array, Array]]
"""`(x_td, rows) -> (y_rd, lost_r)`."""


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


def hop(x_td: Array, rows: Rows, line: Line, capacity: int, inside: Inside) -> tuple[Array, Array]:
  """Rows to their experts and back through `capacity` places for each destination.

  A destination that is full loses the rows that come last, in the order of the rows: token-major rows lose later
  tokens, never because of later ones.

  Returns:
    `y_rd`, zero for rows that were lost or have no expert, and `lost_r`.
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
  x_ud, expert_u = (line.all_to_all(a) for a in (spread(x_td, rows, row_u, place_r), expert_u))
  y_ud, lost_u = inside(x_ud, expert_u)
  y_rd = take(line.all_to_all(y_ud), place_r, row_u)
  lost_r = wanted_r & ~fits_r
  if lost_u is not None:
    back_u = line.all_to_all(lost_u.astype(jnp.int8)) > 0
    lost_r = lost_r | (fits_r & back_u.at[place_r].get(mode='clip'))
  return y_rd, lost_r


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
  """`(y_td, lost_r)` of a hop, in so many chunks of tokens whose transfers and work do not wait for each other.

  The compiler may send a chunk while experts work on another. What the one for TPUs makes of two chunks on four v5p
  (libtpu 0.0.42, tests/moe/test_schedule.py): by itself it leaves an all-to-all in one piece, nothing overlaps. With
  `xla_tpu_enable_async_all_to_all=true` (a compiler option, or in LIBTPU_INIT_ARGS) outputs of the first chunk travel
  while experts work on the second; rows of the second are still not sent before the work on the first is done.

  Raises:
    ValueError: chunks that do not divide the tokens of a device, or rows that do not follow their tokens.
  """
  num_tokens = x_td.shape[0]
  if num_tokens % chunks or (chunks > 1 and not rows.choices):
    raise ValueError(
      f'chunks={chunks}: accepted are divisors of the {num_tokens} tokens of a device, and 1 for routers whose '
      'experts choose'
    )
  parts = []
  for index in range(chunks):
    size = num_tokens // chunks
    of = rows.part(index, chunks) if chunks > 1 else rows
    y_rd, lost_r = one(x_td[index * size : (index + 1) * size], of)
    arrived_r = (of.expert < of.num_experts) & ~lost_r
    parts.append((add_up(y_rd, of, arrived_r, size).astype(y_rd.dtype), lost_r))
  return jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if chunks > 1 else parts[0]
