"""Rows travel and experts work in one kernel: products of some experts while rows of others are on their way."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from moejax.moe.exchange.hop import Line, spread
from moejax.moe.exchange.rows import Rows, add_up, take
from moejax.moe.experts import Experts
from moejax.routers.capacity import rank_within
from pallas_kernels import Unsupported, chips, exchange_matmul, hidden, matmul_exchange, segments
from pallas_kernels.exchange_matmul import NAMES


def check_kernel(kernel: str | None, mesh: Mesh, width: str | None, chunks: int) -> None:
  """Refuses what one kernel does not do.

  Raises:
    ValueError: a name that does not exist, devices that it is not made for, experts cut by hidden width, or chunks.
  """
  if kernel is None:
    return
  if kernel not in NAMES:
    raise ValueError(f'{kernel=}: accepted are {", ".join(map(repr, NAMES))} and None')
  if width is not None:
    raise ValueError(f'{kernel=} with mesh axis {width}={mesh.shape[width]}: accepted is 1')
  if chunks > 1:
    raise ValueError(f'{kernel=} with {chunks=}: accepted is 1, for rows travel beside products')
  try:
    for device in mesh.devices.flat:
      chips.check_device('exchange_matmul', kernel, device)
  except Unsupported as error:
    raise ValueError(f'{kernel=}: {error}') from error


def in_one_kernel(
  x_td: Array, rows: Rows, line: Line, most: int, buffer: int, experts: Experts, kernel: str
) -> tuple[Array, Array]:
  """`(y_td, lost_r)`: to the experts and the first matmul, the activation, the last matmul and back.

  Args:
    x_td: tokens of this device.
    rows: its rows.
    line: the devices.
    most: rows that it can have.
    buffer: places for the rows of all devices; what lies between segments is added.
    experts: of this device.
    kernel: a body of `exchange_matmul`.
  """
  num_tokens, num_experts = x_td.shape[0], rows.num_experts
  counts_e = jnp.bincount(rows.expert, length=num_experts + 1)[:-1].astype(jnp.int32)
  sizes = jax.lax.all_gather(counts_e, line.axis).reshape(line.size, line.size, line.each)
  gaps = num_experts * (segments.CHUNK - 1)
  length, room = segments.up(most + gaps), segments.up(buffer + gaps)
  there = segments.route(sizes, length, room)
  sent = segments.received(there.back(), jax.lax.axis_index(line.axis))  # by expert

  rank_r = rank_within(rows.expert, num_experts)
  of = lambda table_e: table_e.at[rows.expert].get(mode='clip')
  wanted_r = rows.expert < num_experts
  arrived_r = wanted_r & (rank_r < of(sent.rows))
  place_r = jnp.where(wanted_r, of(sent.first) + rank_r, length)
  row_u = jnp.full((length + 1,), rows.expert.size, jnp.int32)
  row_u = row_u.at[place_r].set(jnp.arange(rows.expert.size, dtype=jnp.int32))[:-1]

  gate, up, down = experts.weights()
  into = (up,) if gate is None else (gate, up)
  to = functools.partial(exchange_matmul, axis_name=line.axis, implementation=kernel)
  fro = functools.partial(matmul_exchange, axis_name=line.axis, implementation=kernel)
  x_ud = spread(x_td, rows, row_u, place_r)
  pre = to(x_ud, sizes, into, num_out_rows=room)
  a = hidden(experts.activation, pre)
  y_ud = fro((a,), sizes, (down,), num_out_rows=length)
  y_td = add_up(take(y_ud, place_r, row_u), rows, arrived_r, num_tokens)
  return y_td.astype(y_ud.dtype), wanted_r & ~arrived_r
