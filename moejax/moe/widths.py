"""Experts of different widths out of a bank of narrow ones of one width, and experts that share a core.

A feed-forward expert of width n u is the sum of n experts of width u: columns of the hidden layer do not meet. So a
row of an expert becomes one row for each of its parts, and costs what its width does; padding all experts to the widest
would cost that.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arrays import Assignment
from moejax.moe.experts import Experts


def parts_of(widths: Sequence[int], num_experts: int, d_ff: int) -> tuple[tuple[int, ...], int]:
  """How many parts every expert has, and their hidden width; `num_experts * d_ff` units in all.

  Raises:
    ValueError: another number of widths, a width below 1, or units that do not divide.
  """
  if len(widths) != num_experts or any(width < 1 for width in widths):
    raise ValueError(f'widths={tuple(widths)}: accepted are {num_experts} integers from 1')
  common = math.gcd(*widths)
  parts = tuple(width // common for width in widths)
  if num_experts * d_ff % sum(parts):
    raise ValueError(
      f'widths={tuple(widths)} of {sum(parts)} parts do not divide num_experts * d_ff={num_experts * d_ff}'
    )
  return parts, num_experts * d_ff // sum(parts)


def rows_of_parts(assignment: Assignment, parts: tuple[int, ...]) -> Assignment:
  """Every row of expert e as `parts[e]` rows of its parts, filled up with dropped ones."""
  most, total = max(parts), sum(parts)
  first_e = jnp.asarray([*itertools.accumulate(parts, initial=0)], jnp.int32)
  parts_e = jnp.asarray([*parts, 0], jnp.int32)

  def spread(row_expert):
    place = jnp.arange(most, dtype=jnp.int32)[None]
    inside = place < parts_e[row_expert][:, None]
    return jnp.where(inside, first_e[row_expert][:, None] + place, total).reshape(-1)

  expert_r = spread(assignment.expert)
  return dataclasses.replace(
    assignment,
    token=jnp.repeat(assignment.token, most),
    expert=expert_r,
    weight=jnp.where(expert_r < total, jnp.repeat(assignment.weight, most), 0),
    chosen=spread(assignment.chosen),
    num_experts=total,
  )


def with_core(experts: Experts, core: Experts) -> Experts:
  """The bank of which every expert is the core plus its own residual."""
  graph, own = nnx.split(experts)
  return nnx.merge(graph, jax.tree.map(jnp.add, own, nnx.split(core)[1]))


def diversify(experts: Experts, one: Experts, rate: float, key: jax.Array) -> None:
  """Makes all experts copies of the one, each with a random part of its weights set to zero.

  EvoMoE's second stage, Nie et al. 2021, section 3.2: after a stage with a single expert. The paper's rate is not
  published.

  Args:
    experts: bank that is written to.
    one: bank of a single expert of the same widths.
    rate: fraction of the weights that is zero.
    key: source of the masks.

  Raises:
    ValueError: a rate that is not from 0 to below 1.
  """
  if not 0 <= rate < 1:
    raise ValueError(f'rate={rate}: accepted are numbers from 0 to below 1')
  old, new = nnx.split(one)[1], nnx.split(experts)[1]
  leaves, structure = jax.tree.flatten(new)
  keys = jax.random.split(key, len(leaves))
  masked = [
    jnp.where(jax.random.bernoulli(k, 1 - rate, leaf.shape), source, jnp.zeros_like(source))
    for k, leaf, source in zip(keys, leaves, jax.tree.leaves(old), strict=True)
  ]
  nnx.update(experts, jax.tree.unflatten(structure, masked))
