"""Packed rows: sorted by expert in one contiguous buffer, and walked in blocks of static width.

Experts are visited in ascending order, so the rows that the last block of an expert writes past its end are
overwritten by the next expert. A buffer therefore needs no padding between experts, only `overrun` rows at
its end. Block widths come from the mean group size: wide blocks feed the matmul units, narrow ones bound the
waste on what is left of a group.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import registry

Array = jax.Array

WIDEST, NARROWEST = 512, 16
# A block that is filled to this part is cheaper than the narrower blocks that fit exactly.
FULL_ENOUGH = 0.8


class Plan(NamedTuple):
  """Where the rows of each expert are.

  Attributes:
    order: int32 `[R]`, row at each packed position; dropped rows are last.
    position: int32 `[R]`, packed position of each row.
    starts: int32 `[E + 1]`, first packed position of each expert, then the number of kept rows.
  """

  order: Array
  position: Array
  starts: Array


def sort_rows(expert_r: Array, num_experts: int) -> Plan:
  """Sorts rows by expert, stably; an expert of `num_experts` or above means dropped (see routing.pack)."""
  args = dict(num_experts=num_experts)
  return Plan(*registry.run('pallas_kernels.routing', 'pack', None, expert_r, **args))


def block_widths(num_rows: int, num_experts: int) -> tuple[int, ...]:
  """Descending widths for groups of `num_rows / num_experts` rows on average."""
  widths = [WIDEST]
  while widths[0] > NARROWEST and widths[0] * 0.75 > num_rows / num_experts:
    widths[0] //= 2
  while len(widths) < 3 and widths[-1] >= 4 * NARROWEST:
    widths.append(widths[-1] // 4)
  return tuple(widths)


def overrun(num_rows: int, num_experts: int) -> int:
  """Rows that a packed buffer needs after its last one."""
  return block_widths(num_rows, num_experts)[0]


def walk(start: Array, end: Array, widths: tuple[int, ...], step: Callable, carry):
  """Visits the packed rows `start..end` in blocks: `carry = step(first_row, width, carry)`.

  Returns the last carry.
  """
  row = start
  for width in widths:
    fill = 1 if width == widths[-1] else int(width * FULL_ENOUGH)
    fits = lambda state, fill=fill: state[0] + fill <= end
    visit = lambda state, width=width: (state[0] + width, step(state[0], width, state[1]))
    row, carry = jax.lax.while_loop(fits, visit, (row, carry))
  return carry


def rows_of_block(first: Array, width: int, end: Array) -> tuple[Array, Array]:
  """Packed positions `[W]` of a block and whether each lies before `end`.

  Positions past the end repeat the last row of the group, so that no other expert's row (which may hold a
  NaN) is read; callers give the repeated rows the weight zero.
  """
  row_w = first + iota(width)
  return jnp.minimum(row_w, end - 1), row_w < end


def iota(size: int) -> Array:
  """int32 `0..size - 1`, under x64 too."""
  return jnp.arange(size, dtype=jnp.int32)


def take(x: Array, index: Array) -> Array:
  """`x[index]` along the first axis, for indices known to be in range."""
  return x.at[index].get(mode='promise_in_bounds')


def add_rows(x: Array, index: Array, rows: Array) -> Array:
  """`x[index] += rows`; a CPU does it one row after the other, so the sum's order is fixed."""
  return x.at[index].add(rows, mode='promise_in_bounds')


def write(x: Array, rows: Array, first: Array) -> Array:
  """`x` with `rows` written from row `first` on."""
  return jax.lax.dynamic_update_slice_in_dim(x, rows, first, axis=0)


def matmul_t(a: Array, b: Array) -> Array:
  """`a @ b.T` without a transposed copy."""
  return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def t_matmul(a: Array, b: Array) -> Array:
  """`a.T @ b` without a transposed copy."""
  return jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())))
