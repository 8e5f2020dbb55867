"""Sparsity-constrained expert choice: a transport plan of which a column has C tokens at most.

Liu, Puigcerver and Blondel 2023, "Sparsity-constrained optimal transport", section 4; one of the six routers of Liu et
al. 2024, "Routers in vision mixture of experts".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.routers.expert_choice import tokens_of_expert
from moejax.routers.router import Router
from moejax.routers.scorers import LinearScorer
from moejax.routers.sinkhorn import planned_expert_choice

PADDING = -1e4
"""Similarity of padding, which no column has among its non-zeros."""


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
  sum to one in the limit, and roughly after the paper's number of steps.

  Args:
    similarity: in [0, 1].
    limit: C.
    real: False for padding, whose rows are zero and not counted in T.
    iterations, learning_rate: of Adam.
  """
  dtype = similarity.dtype
  real = jnp.ones(similarity.shape[:2], bool) if real is None else real
  wanted_gt = real.astype(dtype)
  mass_g = wanted_gt.sum(1) / jnp.asarray(similarity.shape[-1], dtype)
  worth_get = jnp.swapaxes(jnp.where(real[..., None], similarity, PADDING), 1, 2)

  def columns(price_gt: Array) -> Array:
    best_gec, index_gec = jax.lax.top_k(worth_get - price_gt[:, None], limit)
    mass_ge = jnp.broadcast_to(mass_g[:, None], best_gec.shape[:2])
    column_gec = onto_simplex(best_gec, mass_ge)
    return jnp.put_along_axis(jnp.zeros_like(worth_get), index_gec, column_gec, -1, inplace=False)

  def step(count, state):
    price_gt, mean_gt, square_gt = state
    slope_gt = columns(price_gt).sum(1) - wanted_gt
    mean_gt = 0.9 * mean_gt + 0.1 * slope_gt
    square_gt = 0.999 * square_gt + 0.001 * slope_gt * slope_gt
    turn = jnp.asarray(count + 1, dtype)
    size_gt = jnp.sqrt(square_gt / (1 - 0.999**turn)) + 1e-8
    return price_gt + learning_rate * mean_gt / (1 - 0.9**turn) / size_gt, mean_gt, square_gt

  nothing = jnp.zeros_like(wanted_gt)
  price_gt = jax.lax.fori_loop(0, iterations, step, (nothing, nothing, nothing))[0]
  return jnp.swapaxes(columns(price_gt), 1, 2)


def onto_simplex(
  falling: Float[Array, '*batch C'], total: Float[Array, '*batch']
) -> Float[Array, '*batch C']:
  """The nearest vector without negative entries that sums to `total`, of entries in falling order.

  It is `max(v - s, 0)`: Duchi et al. 2008, "Efficient projections onto the l1-ball for learning in high dimensions".
  """
  count = jnp.arange(1, falling.shape[-1] + 1).astype(falling.dtype)
  shift = (jnp.cumsum(falling, -1) - total[..., None]) / count.reshape(
    (1,) * (falling.ndim - 1) + (-1,)
  )
  last = jnp.maximum((falling > shift).sum(-1, keepdims=True) - 1, 0)
  return jnp.maximum(falling - jnp.take_along_axis(shift, last, -1), 0)


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
