"""BASE layers: in training a linear assignment gives every expert equally many tokens (Lewis et al. 2021, "BASE
layers: simplifying training of large, sparse models")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.expert_choice import from_groups, to_groups
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import LinearScorer, only
from moejax.routers.top_k import TopKAssign, check_name
from moejax.routers.weighting import raw


def balanced_assignment(
  affinity_te: Float[Array, 'T E'], real_t: Bool[Array, ' T'] | None = None
) -> Int[Array, ' T']:
  """Expert of every token with the largest sum of affinities, no expert with more than C = ceil(T / E) tokens.

  Exact, up to rounding. Tokens first take their best expert at prices that nearly balance the loads; whatever the
  prices, no assignment with these loads has a larger sum. Then one token at a time leaves the overloaded experts, along
  the cheapest chain of moves from expert to expert (successive shortest paths), which keeps that so.

  Args:
    affinity_te: no gradient is taken.
    real_t: False for padding, which takes no place and has any expert.
  """
  num_tokens, num_experts = affinity_te.shape
  real_t = jnp.ones(num_tokens, bool) if real_t is None else real_t
  count = real_t.sum(dtype=jnp.int32)
  places = (count + num_experts - 1) // num_experts
  # a constant for a token changes nothing, and makes the range that of choices
  worth_te = affinity_te - affinity_te.max(-1, keepdims=True)
  worth_te = jnp.where(real_t[:, None], worth_te, 0)
  worth_te = worth_te / jnp.maximum(-worth_te.min(), jnp.finfo(worth_te.dtype).tiny)
  # as many tokens without affinity as fill all places
  worth_te = jnp.pad(worth_te, ((0, num_experts - 1), (0, 0)))
  fill = jnp.arange(num_experts - 1, dtype=jnp.int32) < places * num_experts - count
  placed_t = jnp.concatenate([real_t, fill])
  price_e = balancing_prices(worth_te, placed_t, places)
  expert_t = jnp.argmax(worth_te - price_e[None], -1).astype(jnp.int32)
  expert_t = jnp.where(placed_t, expert_t, num_experts)

  def overloaded(state):
    return (_loads(state[0], num_experts) > places).any()

  def move_one(state):
    return _move_one(worth_te, places, *state)

  expert_t, _ = jax.lax.while_loop(overloaded, move_one, (expert_t, price_e))
  return jnp.minimum(expert_t, num_experts - 1)[:num_tokens]


def balancing_prices(
  worth_te: Float[Array, 'T E'], placed_t: Bool[Array, ' T'], places: Int[Array, '']
) -> Float[Array, ' E']:
  """Prices at which the choices of tokens, softmax at falling temperatures, fill every expert's places.

  Args:
    worth_te: affinities in [-1, 0].
    placed_t: which tokens count.
    places: C.
  """
  dtype = worth_te.dtype
  log_places = jnp.log(jnp.maximum(places, 1).astype(dtype))

  def one_round(index, price_e):
    temperature = jnp.asarray(0.5, dtype) ** (index // 10).astype(dtype)  # ten rounds of each
    log_te = jax.nn.log_softmax((worth_te - price_e[None]) / temperature, -1)
    log_load_e = jax.nn.logsumexp(log_te, 0, where=placed_t[:, None])
    change_e = jnp.maximum(log_load_e, jnp.asarray(-1e3, dtype)) - log_places
    return price_e + temperature * change_e

  return jax.lax.fori_loop(0, 100, one_round, jnp.zeros_like(worth_te[0]))


def _loads(expert_t: Array, num_experts: int) -> Array:
  return jnp.bincount(expert_t, length=num_experts + 1)[:-1].astype(jnp.int32)


def _move_one(
  worth_te: Array, places: Array, expert_t: Array, price_e: Array
) -> tuple[Array, Array]:
  """One token less on an overloaded expert, one more on one with free places, at the least loss."""
  num_experts = price_e.size
  load_e = _loads(expert_t, num_experts)
  value_te = worth_te - price_e[None]
  own = jnp.take_along_axis(value_te, jnp.minimum(expert_t, num_experts - 1)[:, None], 1)
  loss_te = jnp.maximum(own - value_te, 0)  # of a token that moves to another expert
  # from an expert to another with the token that loses least
  loss_ee = jax.ops.segment_min(loss_te, expert_t, num_experts + 1)[:-1]
  total_e, parent_e = _cheapest_paths(load_e > places, loss_ee)
  end = jnp.argmin(jnp.where(load_e < places, total_e, jnp.inf)).astype(jnp.int32)

  def follow(state):
    expert_t, to = state
    token = jnp.argmin(jnp.where(expert_t == parent_e[to], loss_te[:, to], jnp.inf))
    return expert_t.at[token].set(to), parent_e[to]

  expert_t, _ = jax.lax.while_loop(lambda state: parent_e[state[1]] >= 0, follow, (expert_t, end))
  return expert_t, price_e - jnp.minimum(total_e, total_e[end])  # so that no move gains


def _cheapest_paths(start_e: Array, loss_ee: Array) -> tuple[Array, Array]:
  """Loss from the nearest start, and the expert before on the way (-1 at a start): Bellman and Ford."""
  total_e = jnp.where(start_e, 0, jnp.inf).astype(loss_ee.dtype)

  def relax(_, state):
    total_e, parent_e = state
    via_ee = total_e[:, None] + loss_ee
    shorter_e = via_ee.min(0) < total_e
    parent_e = jnp.where(shorter_e, via_ee.argmin(0).astype(jnp.int32), parent_e)
    return jnp.where(shorter_e, via_ee.min(0), total_e), parent_e

  state = (total_e, jnp.full(total_e.shape, -1, jnp.int32))
  return jax.lax.fori_loop(0, total_e.size - 1, relax, state)


@dataclasses.dataclass(frozen=True)
class BaseAffinity:
  """Sigmoid gates; in training the assignment selects, outside of it the logits.

  Attributes:
    group: 'sequence' or 'batch', the tokens that share the places.
  """

  group: str

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity('sigmoid', 1)(logits_bse, std, bias_e, context)
    if not context.train:
      return scores
    affinity_gte = to_groups(jax.lax.stop_gradient(logits_bse), self.group)
    mask_bs = jnp.ones(logits_bse.shape[:2], bool) if context.mask is None else context.mask
    expert_gt = jax.vmap(balanced_assignment)(affinity_gte, to_groups(mask_bs, self.group))
    expert_bs = from_groups(expert_gt, self.group, (mask_bs.shape[0], mask_bs.shape[1]))
    return dataclasses.replace(
      scores, select=only(expert_bs, logits_bse.shape[-1], logits_bse.dtype)
    )


def base(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  group: str = 'batch',
  init_gain: float = 0.1,
) -> Router:
  """Balanced assignment of single experts.

  In training every expert has `ceil(T / E)` tokens at most, and a token's expert depends on all others; in evaluation
  every token has the expert of its largest affinity `a = x . w_e`, balanced or not. No balance loss. The weight is
  `sigmoid(a)`; the paper's `alpha F(x) + (1 - alpha) x` of an expert F(x) = x + f(x) is `x + alpha f(x)`: what a
  block with its residual makes of this layer. The assignment is exact, where the released auction (increments of 1/50
  of the range, 100 rounds) stops near the optimum. The random exchange of tokens between workers is not needed: the
  group is the whole batch. The paper has one such layer, of deep experts whose last weights begin at zero.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial centroids.
    group: 'batch' or 'sequence', the tokens that share the places.
    init_gain: the centroids are orthogonal at first, of this length.

  Raises:
    ValueError: an option out of its range.
  """
  check_name('group', group, ('sequence', 'batch'))
  init = nnx.initializers.orthogonal(init_gain)
  return Router(
    LinearScorer(d_model, num_experts, init=init, rngs=rngs),
    BaseAffinity(group),
    TopKAssign(1, raw),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=False, prefix_safe_eval=True, batch_free=group == 'sequence'),
    choices=1,
  )
