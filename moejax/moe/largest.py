"""The k largest along the first axis, with the other axes in a processor's lanes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GROUP = 8
"""Entries whose maximum stands for them in the first of two selections."""


def largest(
  x: Float[Array, 'E *batch'], k: int
) -> tuple[Float[Array, 'K *batch'], Int[Array, 'K *batch']]:
  """Values and int32 numbers of the k largest, best first; of equal ones the lowest number first.

  XLA's `top_k` on a CPU takes one row after the other. Here all rows go through k rounds of a maximum each, among the
  maxima of groups, then among the members of the k best groups: nothing else can be among the k best. Elsewhere it is
  `top_k`. A NaN is the largest; which numbers are given beside one is not defined, but they are numbers of entries.
  """
  return jax.lax.platform_dependent(
    x, cpu=lambda x: _by_groups(x, k), default=lambda x: _by_top_k(x, k)
  )


def _by_top_k(x, k):
  found = jax.lax.top_k(jnp.moveaxis(x, 0, -1), k)
  return tuple(jnp.moveaxis(part, -1, 0) for part in found)


def _by_groups(x, k):
  groups = len(x) // GROUP
  if len(x) % GROUP or groups < 2 * k:
    return _in_rounds(x, _iota(x.shape), k)
  best = x.reshape(groups, GROUP, *x.shape[1:]).max(1)
  _, group = _in_rounds(best, _iota(best.shape), k)
  number = group[:, None] * GROUP + _iota((1, GROUP, *x.shape[1:]), 1)
  number = number.reshape(k * GROUP, *x.shape[1:])
  members = jnp.take_along_axis(x, number, 0, mode='promise_in_bounds')
  return _in_rounds(members, number, k)


def _in_rounds(x, number, k):

  def one(x, _):
    most = x.max(0, keepdims=True)
    here = jnp.where(x < most, jnp.iinfo(number.dtype).max, number)  # a NaN is not below another
    here = here.min(0, keepdims=True)
    return jnp.where(number == here, -jnp.inf, x), (most[0], here[0])

  return jax.lax.scan(one, x, None, length=k)[1]


def _iota(shape, axis=0):
  return jax.lax.broadcasted_iota(jnp.int32, shape, axis)
