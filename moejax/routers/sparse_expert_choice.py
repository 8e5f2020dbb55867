"""Sparsity-constrained expert choice: a transport plan of which a column has C tokens at most.

Liu, Puigcerver and Blondel 2023, "Sparsity-constrained optimal transport", section 4; one of the six routers of Liu et
al. 2024, "Routers in vision mixture of experts".
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.mesh.replicated import replicated
from moejax.routers.expert_choice import tokens_of_expert
from moejax.routers.router import Router
from moejax.routers.scorers import LinearScorer
from moejax.routers.sinkhorn import planned_expert_choice

PADDING = -1e4
"""Similarity of padding, which no column has among its non-zeros."""
LANES = 64
"""Experts whose columns a CPU works on at once, at most."""


def sparse_plan(
  similarity: Float[Array, 'G T E'],
  limit: int,
  real: Bool[Array, 'G T'] | None = None,
  *,
  iterations: int = 20,
  learning_rate: float = 0.01,
) -> Float[Array, 'G T E']:
  """Plan P of `max <similarity, P> - |P|^2 / 2`, columns summing to T / E with `limit` non-zeros at most.

  Given a price of every token, a column is the projection of similarity less price onto the simplex, of its `limit`
  largest entries alone. Prices are moved by Adam on the semi-dual, whose gradient is one less the row's sum: so rows
  sum to one in the limit, and roughly after the paper's number of steps. A CPU makes the plan of one group after the
  other and some experts at a time, so that they stay in its cache.

  Args:
    similarity: in [0, 1].
    limit: C.
    real: False for padding, whose rows are zero and not counted in T.
    iterations, learning_rate: of Adam.
  """
  wanted = jnp.ones(similarity.shape[:2], bool) if real is None else real
  plan = functools.partial(
    _plan_of_group, limit=limit, iterations=iterations, learning_rate=learning_rate
  )

  def one_by_one(similarity, wanted):
    of_group = functools.partial(plan, width=math.gcd(similarity.shape[-1], LANES))
    groups = replicated(similarity), replicated(wanted)
    return jax.lax.map(lambda group: of_group(*group), groups)

  together = jax.vmap(functools.partial(plan, width=similarity.shape[-1]))
  return jax.lax.platform_dependent(similarity, wanted, cpu=one_by_one, default=together)


def _plan_of_group(similarity_te, real_t, *, limit, iterations, learning_rate, width):
  num_tokens, num_experts = similarity_te.shape
  dtype = similarity_te.dtype
  wanted_t = real_t.astype(dtype)
  mass = wanted_t.sum() / num_experts
  worth_te = jnp.where(real_t[:, None], similarity_te, PADDING)
  worth_ctw = jnp.swapaxes(worth_te.reshape(num_tokens, -1, width), 0, 1)
  columns = lambda worth_tw, price_t: onto_simplex(worth_tw - price_t[:, None], mass, limit)

  def step(count, state):
    price_t, mean_t, square_t = state
    add = lambda sum_t, worth_tw: (sum_t + columns(worth_tw, price_t).sum(1), None)
    slope_t = jax.lax.scan(add, -wanted_t, worth_ctw)[0]
    mean_t = 0.9 * mean_t + 0.1 * slope_t
    square_t = 0.999 * square_t + 0.001 * slope_t * slope_t
    turn = jnp.asarray(count + 1, dtype)
    size_t = jnp.sqrt(square_t / (1 - 0.999**turn)) + 1e-8
    return price_t + learning_rate * mean_t / (1 - 0.9**turn) / size_t, mean_t, square_t

  nothing = jnp.zeros_like(wanted_t)
  price_t = jax.lax.fori_loop(0, iterations, step, (nothing, nothing, nothing))[0]
  plan_ctw = jax.lax.map(lambda worth_tw: columns(worth_tw, price_t), worth_ctw)
  return jnp.swapaxes(plan_ctw, 0, 1).reshape(num_tokens, num_experts)


def onto_simplex(
  x: Float[Array, 'T E'], total: Float[Array, ''], limit: int
) -> Float[Array, 'T E']:
  """Of every column the nearest vector that sums to `total`, without negative entries, with `limit` others at most.

  It is `max(x - s, 0)` of the largest entries. The shift s rises from what all of them would need to what those need
  that stay positive (Michelot 1986, "A finite algorithm for finding the projection of a point onto the canonical
  simplex of R^n").
  """
  among = among_largest(x, limit)

  def shift_of(those):
    count = jnp.maximum(those.sum(0, keepdims=True, dtype=jnp.int32), 1).astype(x.dtype)
    return (jnp.where(those, x, 0).sum(0, keepdims=True) - total) / count

  def rise(state):
    shift, _ = state
    higher = jnp.maximum(shift_of(among & (x > shift)), shift)
    return higher, (higher > shift).any()

  shift, _ = jax.lax.while_loop(lambda state: state[1], rise, (shift_of(among), jnp.array(True)))
  return jnp.where(among, jnp.maximum(x - shift, 0), 0)


def among_largest(x: Float[Array, 'T E'], limit: int) -> Bool[Array, 'T E']:
  """Which entries are among the `limit` largest of their column; of equal ones the first are.

  The least of them is found bit by bit, by counting how many are as large: so all columns are worked on at once, and
  nothing is sorted.
  """
  key = _ordered(x)
  bits = jnp.iinfo(key.dtype).bits
  one = jnp.ones((), key.dtype)

  def next_bit(number, least):
    larger = least + (one << (bits - 1 - number).astype(key.dtype))
    enough = (key >= larger).sum(0, keepdims=True, dtype=jnp.int32) >= limit
    return jnp.where(enough, larger, least)

  least = jnp.full((1, x.shape[1]), jnp.iinfo(key.dtype).min, key.dtype)
  least = jax.lax.fori_loop(0, bits, next_bit, least)
  above, equal = key > least, key == least
  left = limit - above.sum(0, keepdims=True, dtype=jnp.int32)
  ties = (equal.sum(0, keepdims=True, dtype=jnp.int32) > left).any()
  first = lambda: equal & (jnp.cumsum(equal, 0, dtype=jnp.int32) <= left)
  return above | jax.lax.cond(ties, first, lambda: equal)


def _ordered(x: Array) -> Array:
  """Integers in the order of these floats."""
  kind = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
  bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), kind)  # not -0
  return jnp.where(bits < 0, bits ^ jnp.iinfo(kind).max, bits)


@dataclasses.dataclass(frozen=True)
class SparsePlan:
  """`sparse_plan` of the gates `softmax(logits)`; `factor` is that of `tokens_of_expert`."""

  factor: float
  iterations: int
  learning_rate: float

  def __call__(self, logits_gte: Array, real_gt: Array | None) -> Array:
    _, num_tokens, num_experts = logits_gte.shape
    return sparse_plan(
      jax.nn.softmax(logits_gte, -1),
      tokens_of_expert(num_tokens, num_experts, self.factor),
      real_gt,
      iterations=self.iterations,
      learning_rate=self.learning_rate,
    )


def sparse_expert_choice(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  capacity_factor: float = 1.0,
  group: str = 'sequence',
  group_size: int | None = None,
  iterations: int = 20,
  learning_rate: float = 0.01,
  init_std: float | None = None,
) -> Router:
  """Every expert takes the non-zeros of its column of the plan, weighted by the softmax gates; no balance loss.

  The plan is of the gates `softmax(x W)` and has no gradient. Prices make tokens dear that many experts want, so that
  fewer are left out than by the gates alone. The released code rounds C up to a multiple of 4; here it is rounded down,
  as in `expert_choice`.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    capacity_factor: mean number of experts a token, at most.
    group, group_size: the tokens of one plan, see `moejax.routers.expert_choice.to_groups`; 'position' alone is
      prefix-safe.
    iterations, learning_rate: of Adam, 20 and 0.01 in the released code.
    init_std: see `LinearScorer`.

  Raises:
    ValueError: an option out of its range.
  """
  if iterations < 0:
    raise ValueError(f'iterations={iterations}: accepted are integers from 0')
  if not learning_rate > 0:
    raise ValueError(f'learning_rate={learning_rate}: accepted are positive numbers')

  return planned_expert_choice(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    SparsePlan(capacity_factor, iterations, learning_rate),
    num_experts=num_experts,
    capacity_factor=capacity_factor,
    group=group,
    group_size=group_size,
    zeros=False,
  )
