"""Packed rows worked on for several experts at once, for as long as most of them have rows.

A product of one expert's few rows is too small to occupy several cores, which spend much of its time waiting for each
other. So experts are taken together, the first rows of each, a few experts at a time so that what is made of their rows
stays in cache. Rows beyond that width, of experts with many, follow expert by expert. Where loads are so uneven that
the batch would be mostly empty, all rows do.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .packed import NARROWEST, Plan, block_widths, iota, take, walk, write

Array = jax.Array

# Rows of several experts that are worked on at once: more make faster products, whose results leave the cache.
BATCHED = 1024
# Rows of an expert, on average, that are a product for several cores.
ENOUGH = 128


class Batch(NamedTuple):
  """The first rows of all experts, for products of several experts at once.

  Attributes:
    width: rows of each expert, at most.
    experts: how many are taken at once; divides E.
    taken_e: int32 `[E]`, rows of each expert in the batch: none where it is not worth its work.
    worth: bool.
  """

  width: int
  experts: int
  taken_e: Array
  worth: Array


def batch(starts: Array, num_rows: int) -> Batch | None:
  """The batch of packed rows whose experts begin at `starts [E + 1]`; None where no loads make it worth its work.

  Its width is what four of a hundred random loads exceed. Loads are too uneven where it would be less than half full,
  or would leave over a quarter of the rows.
  """
  num_experts = starts.shape[0] - 1
  mean = num_rows / num_experts
  width = -(-math.ceil(mean + 1.75 * math.sqrt(mean)) // NARROWEST) * NARROWEST
  if mean > ENOUGH or 4 * width * num_experts > 7 * num_rows:
    return None
  experts = max(d for d in range(1, BATCHED // width + 1) if num_experts % d == 0)
  if experts == 1:
    return None
  taken_e, kept = jnp.minimum(starts[1:] - starts[:-1], width), starts[-1]
  left = kept - jnp.sum(taken_e, dtype=jnp.int32)
  worth = (4 * left <= kept) & (2 * kept >= num_experts * width)
  return Batch(width, experts, jnp.where(worth, taken_e, 0), worth)


class Rows(NamedTuple):
  """The packed rows `first..end` of some experts, `width` of each at most.

  Attributes:
    row: `[C W]`, those of the first expert first; past an expert's end, any, but of one expert alone its last.
    inside: bool `[C W]`, those before the end.
    token: `[C W]`.
    weight: `[C W]`, 0 past the end.
    num_experts: C.
  """

  row: Array
  inside: Array
  token: Array
  weight: Array
  num_experts: int

  def of_tokens(self, x_td: Array) -> Array:
    """`x_td[token]` as `[C, W, D]`; past the end zero, or the last row again, for others' rows may hold a NaN."""
    values = take(x_td, self.token)
    return self.by_expert(values if self.num_experts == 1 else self._inside(values, 0))

  def of(self, x: Array, first: int = 0) -> Array:
    """`x[first + row]` as `[C, W, ...]`, zero past the end, of an array with `overrun` more rows than there are."""
    alone = self.num_experts == 1
    values = self._read(x, first + self.row[0]) if alone else take(x, first + self.row)
    return self.by_expert(self._inside(values, 0))

  def put(self, x: Array, values: Array, first: int = 0) -> Array:
    """`x` with `values [C, W, ...]` in the rows, counted from row `first` of x, which has `overrun` more rows."""
    flat = values.reshape(-1, *values.shape[2:]).astype(x.dtype)
    if self.num_experts == 1:
      start = first + self.row[0]
      return write(x, self._inside(flat, self._read(x, start)), start)
    return x.at[jnp.where(self.inside, first + self.row, len(x))].set(flat, mode='drop')

  def by_expert(self, values: Array) -> Array:
    """`[C W, ...] -> [C, W, ...]`."""
    return values.reshape(self.num_experts, -1, *values.shape[1:])

  def _read(self, x: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, self.row.size)

  def _inside(self, values: Array, others: Array | int) -> Array:
    inside = self.inside.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(inside, values, others)


def rows_of(first_c: Array, end_c: Array, width: int, token_r: Array, weight_r: Array) -> Rows:
  """The packed rows `first..end` of C experts, whose tokens and weights are given in packed order."""
  row_cw = first_c[:, None] + iota(width)[None]
  inside = (row_cw < end_c[:, None]).reshape(-1)
  row = jnp.minimum(row_cw, jnp.maximum(end_c[:, None] - 1, 0)).reshape(-1)
  weight = jnp.where(inside, take(weight_r, row), 0)
  return Rows(row, inside, take(token_r, row), weight, first_c.shape[0])


def each_expert(
  plan: Plan,
  num_rows: int,
  weights: Sequence[Array],
  visit: Callable,
  carry,
  zeros: Callable = lambda num_experts: (),
):
  """Visits all packed rows of all experts: the batch, then what it leaves.

  Args:
    plan: where the rows are.
    num_rows: R.
    weights: arrays `[E, ...]`.
    visit: `(first_c, end_c, width, weights of C experts, carry) -> (carry, sums of C experts)`, of the packed rows
      `first..end` of each, `width` at most.
    carry: what visits hand on.
    zeros: `C -> sums of C experts` that have no rows.

  Returns:
    The last carry, and the sums of all experts.
  """
  first_e, end_e = plan.starts[:-1], plan.starts[1:]
  num_experts = first_e.size
  widths = block_widths(num_rows, num_experts)

  def one(first, end, weights, carry, sums):
    """Adds the rows of one expert, in blocks."""

    def visit_block(row, width, state):
      carry, before = state
      carry, found = visit(row[None], end[None], width, weights, carry)
      return carry, tuple(map(jnp.add, before, found))

    return walk(first, end, widths, visit_block, (carry, sums))

  cut = batch(plan.starts, num_rows)
  if cut is None:
    return _all(first_e, end_e, weights, one, carry, zeros)
  together = lambda carry: _together(cut, first_e, weights, visit, carry)
  nothing = lambda carry: (carry, zeros(num_experts))
  carry, sums = jax.lax.cond(cut.worth, together, nothing, carry)
  return _others(first_e + cut.taken_e, end_e, weights, one, carry, sums)


def _all(first_e, end_e, weights, one, carry, zeros):
  """Expert by expert."""

  def visit_expert(carry, scanned):
    first, end, *weights = scanned
    carry, sums = one(first, end, [w[None] for w in weights], carry, zeros(1))
    return carry, tuple(total[0] for total in sums)

  return jax.lax.scan(visit_expert, carry, (first_e, end_e, *weights))


def _together(cut, first_e, weights, visit, carry):
  """The batch."""
  some = lambda x: x.reshape(-1, cut.experts, *x.shape[1:])
  every = lambda x: x.reshape(-1, *x.shape[2:])
  step = lambda carry, xs: visit(xs[0], xs[1], cut.width, xs[2:], carry)
  scanned = tuple(map(some, (first_e, first_e + cut.taken_e, *weights)))
  carry, sums = jax.lax.scan(step, carry, scanned)
  return carry, tuple(map(every, sums))


def _others(first_e, end_e, weights, one, carry, sums):
  """Expert by expert, those that have rows `first..end`; their sums are added to what there is."""
  (having,) = jnp.nonzero(end_e > first_e, size=first_e.size, fill_value=0)

  def visit_expert(i, state):
    carry, sums = state
    e = having[i]
    own = lambda x: jax.lax.dynamic_slice_in_dim(x, e, 1)
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, e, 0)
    found = one(first_e[e], end_e[e], list(map(own, weights)), carry, tuple(map(own, sums)))
    return found[0], tuple(map(put, sums, found[1]))

  count = jnp.sum(end_e > first_e, dtype=jnp.int32)
  return jax.lax.fori_loop(0, count, visit_expert, (carry, sums))
