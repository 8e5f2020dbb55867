"""BASE layers: in training a linear assignment gives every expert equally many tokens (Lewis et al. 2021, "BASE
layers: simplifying training of large, sparse models")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Context, Scores
from moejax.mesh.replicated import replicated
from moejax.routers.affinity import TokenAffinity
from moejax.routers.capacity import rank_within
from moejax.routers.expert_choice import from_groups, to_groups
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import LinearScorer, only
from moejax.routers.top_k import TopKAssign, check_name
from pallas_kernels import pack

FIRST_TEMPERATURE, COOLINGS = 1 / 8, 4
"""Of the choices that prices balance, over the range of affinities: each is a quarter of the one before."""
ROUNDS = 8
"""Of each temperature."""


def balanced_assignment(
  affinity_te: Float[Array, 'T E'], real_t: Bool[Array, ' T'] | None = None
) -> Int[Array, ' T']:
  """Expert of every token with the largest sum of affinities, no expert with more than C = ceil(T / E) tokens.

  Exact, up to rounding. Tokens first take their best expert at prices that nearly balance the loads; whatever the
  prices, no assignment with these loads has a larger sum. Then tokens leave the overloaded experts, along the cheapest
  chains of moves from expert to expert (successive shortest paths), which keeps that so.

  Args:
    affinity_te: no gradient is taken; a token with one that is not finite prefers no expert.
    real_t: False for padding, which takes no place and has any expert.
  """
  num_tokens, num_experts = affinity_te.shape
  most_fill = -num_tokens % num_experts if real_t is None else num_experts - 1
  real_t = jnp.ones(num_tokens, bool) if real_t is None else real_t
  count = real_t.sum(dtype=jnp.int32)
  places = (count + num_experts - 1) // num_experts
  # a constant for a token changes nothing, and makes the range that of choices
  most_t = affinity_te.max(-1)
  range_t = most_t - affinity_te.min(-1)
  known_t = real_t & jnp.isfinite(range_t)
  span = jnp.where(known_t, range_t, 0).max()
  span = jnp.maximum(span, jnp.finfo(affinity_te.dtype).tiny)
  worth_te = jnp.where(known_t[:, None], (affinity_te - most_t[:, None]) / span, 0)
  # as many tokens without affinity as fill all places
  worth_te = jnp.pad(worth_te, ((0, most_fill), (0, 0)))
  fill = jnp.arange(most_fill, dtype=jnp.int32) < places * num_experts - count
  placed_t = jnp.concatenate([real_t, fill])
  price_e = balancing_prices(worth_te, placed_t, places)
  expert_t = jnp.where(placed_t, _first_best(worth_te - price_e[None]), num_experts)

  def overloaded(state):
    return (state[2] > places).any()

  def move(state):
    return _move(worth_te, places, *state)

  state = (expert_t, price_e, _loads(expert_t, num_experts))
  expert_t = jax.lax.while_loop(overloaded, move, state)[0]
  return jnp.minimum(expert_t, num_experts - 1)[:num_tokens]


def _balanced_groups(affinity_gte: Array, real_gt: Array | None) -> Array:
  """`balanced_assignment` of every group: on a CPU one after the other, so that each stays in the cache and ends when
  it is done.

  On a mesh every device makes all of them: the steps are few and small, but each would wait for the other devices, and
  how many there are, the affinities say.
  """

  def one_by_one(*groups):
    return jax.lax.map(lambda group: balanced_assignment(*group), groups)

  groups = (affinity_gte,) if real_gt is None else (affinity_gte, real_gt)
  together = jax.vmap(balanced_assignment)
  whole = jax.tree.map(replicated, groups)
  return replicated(jax.lax.platform_dependent(*whole, cpu=one_by_one, default=together))


def balancing_prices(
  worth_te: Float[Array, 'T E'], placed_t: Bool[Array, ' T'], places: Int[Array, '']
) -> Float[Array, ' E']:
  """Prices at which the choices of tokens, softmax at falling temperatures, nearly fill every expert's places.

  Args:
    worth_te: affinities in [-1, 0].
    placed_t: which tokens count.
    places: C.
  """
  dtype = worth_te.dtype
  least = jnp.asarray(1e-30, dtype)

  def balanced(choice_te):

    def one_round(_, scale_e):
      total_t = choice_te @ scale_e
      load_e = (1 / jnp.maximum(total_t, least)) @ choice_te
      return jnp.maximum(places, 1).astype(dtype) / jnp.maximum(load_e, least)

    return jax.lax.fori_loop(0, ROUNDS, one_round, jnp.ones_like(worth_te[0]))

  def cooled(state, temperature):
    choice_te, scale_e, price_e = state
    total_t = jnp.maximum(choice_te @ scale_e, least)
    # the choice at a quarter of the temperature is the fourth power: no exponential
    choice_te = jnp.square(jnp.square(choice_te * scale_e[None] / total_t[:, None]))
    scale_e = balanced(choice_te)
    return (choice_te, scale_e, price_e - temperature * jnp.log(scale_e)), None

  choice_te = jnp.where(placed_t[:, None], jnp.exp(worth_te / FIRST_TEMPERATURE), 0)
  scale_e = balanced(choice_te)
  price_e = -FIRST_TEMPERATURE * jnp.log(scale_e)
  temperatures = jnp.asarray([FIRST_TEMPERATURE / 4 ** (n + 1) for n in range(COOLINGS)], dtype)
  return jax.lax.scan(cooled, (choice_te, scale_e, price_e), temperatures)[0][2]


def _first_best(value_te: Array) -> Array:
  """The first expert of the largest value; two passes, which a CPU makes faster than `argmax`."""
  experts = jnp.arange(value_te.shape[1], dtype=jnp.int32)[None]
  best_te = value_te == value_te.max(-1, keepdims=True)
  return jnp.where(best_te, experts, experts[:, -1:]).min(-1)


def _loads(expert_t: Array, num_experts: int) -> Array:
  return jnp.bincount(expert_t, length=num_experts + 1)[:-1].astype(jnp.int32)


def _move(
  worth_te: Array, places: Array, expert_t: Array, price_e: Array, load_e: Array
) -> tuple[Array, Array, Array]:
  """Chains of moves from overloaded experts to those with free places, at the least loss."""
  num_experts = price_e.size
  value_te = worth_te - price_e[None]
  own = jnp.take_along_axis(value_te, jnp.minimum(expert_t, num_experts - 1)[:, None], 1)
  loss_te = jnp.maximum(own - value_te, 0)  # of a token that moves to another expert
  # from an expert to another with the token that loses least
  loss_ee = jax.ops.segment_min(loss_te, expert_t, num_experts + 1)[:-1]
  free_e = load_e < places
  total_e, parent_e = _cheapest_paths(load_e > places, free_e, loss_ee)
  token_e = _cheapest_tokens(worth_te, expert_t, parent_e)
  moves_e = _together(free_e, parent_e, token_e, load_e - places, expert_t.size)
  experts = jnp.arange(num_experts, dtype=jnp.int32)
  token_e = jnp.where(moves_e, token_e, expert_t.size)
  expert_t = expert_t.at[token_e].set(experts, mode='drop')
  furthest = jnp.where(free_e, total_e, 0).max()
  price_e = price_e - jnp.minimum(total_e, furthest)  # so that no move gains
  return expert_t, price_e, _loads(expert_t, num_experts)


def _cheapest_tokens(worth_te: Array, expert_t: Array, parent_e: Array) -> Array:
  """The token of each expert's parent that loses least when it comes from there.

  Only the tokens of parents are looked at, as many at once as an expert has on average; of equals, experts side by
  side begin with unlike ones, so that they choose unlike tokens.
  """
  num_tokens, num_experts = worth_te.shape
  width = -(-num_tokens // num_experts)
  packing = pack(expert_t, num_experts)
  expert_e = jnp.arange(num_experts, dtype=jnp.int32)[:, None]
  parent_e = jnp.maximum(parent_e, 0)
  first_e = packing.starts[parent_e]
  size_e = packing.starts[parent_e + 1] - first_e
  slot_w = jnp.arange(width, dtype=jnp.int32)[None]

  def look(state):
    looked, least_e, token_e = state
    slot_ew = looked + slot_w
    turned_ew = (slot_ew + expert_e) % jnp.maximum(size_e, 1)[:, None]
    token_ew = packing.order[jnp.minimum(first_e[:, None] + turned_ew, num_tokens - 1)]
    loss_ew = worth_te[token_ew, parent_e[:, None]] - worth_te[token_ew, expert_e]
    loss_ew = jnp.where(slot_ew < size_e[:, None], loss_ew, jnp.inf)
    of_e = loss_ew.min(1)
    at_e = jnp.where(loss_ew == of_e[:, None], slot_w, width - 1).min(1)
    found_e = jnp.take_along_axis(token_ew, at_e[:, None], 1)[:, 0]
    less_e = of_e < least_e
    return looked + width, jnp.minimum(of_e, least_e), jnp.where(less_e, found_e, token_e)

  nothing = jnp.full(num_experts, jnp.inf, worth_te.dtype)
  state = (jnp.zeros((), jnp.int32), nothing, jnp.zeros(num_experts, jnp.int32))
  most = size_e.max()
  return jax.lax.while_loop(lambda state: state[0] < most, look, state)[2]


def _least(value_re: Array) -> Array:
  """Row of the least value of each column; of equals the next one after a row of the column's own, so that columns
  choose unlike rows. Two minima, which a CPU finds faster than `argmin`."""
  rows, columns = value_re.shape
  row_r = jnp.arange(rows, dtype=jnp.int32)[:, None]
  first_e = jnp.arange(columns, dtype=jnp.int32)[None] * max(1, rows // columns) % rows
  after_re = row_r - first_e + jnp.where(row_r < first_e, rows, 0)
  least_re = value_re == value_re.min(0, keepdims=True)
  after_e = jnp.where(least_re, after_re, rows - 1).min(0)
  return (after_e + first_e[0]) % rows


def _together(
  free_e: Array, parent_e: Array, token_e: Array, excess_e: Array, num_tokens: int
) -> Array:
  """Which experts take the token from their parent, all at once: those on paths to experts with free places that meet
  in starts alone, where they take different tokens and no more than the excess.

  An expert is claimed by the first of the paths through it, a token at a start by the first that takes it; a path
  that has all its claims is one of them.
  """
  num_experts = free_e.size
  path_e = jnp.arange(num_experts, dtype=jnp.int32)
  nobody = jnp.full(1, num_experts, jnp.int32)
  starts_e = parent_e < 0
  leaves_e = ~starts_e & starts_e[parent_e]  # the first expert after a start
  before = jnp.concatenate([jnp.where(starts_e | leaves_e, num_experts, parent_e), nobody])
  end_e = jnp.where(free_e, path_e, num_experts)
  along = lambda state: (state[0] < num_experts).any()

  def claim(state):
    at_e, owner = state
    return before[at_e], owner.at[at_e].min(path_e)

  unclaimed = jnp.full(num_experts + 1, num_experts, jnp.int32)
  _, owner = jax.lax.while_loop(along, claim, (end_e, unclaimed))

  def check(state):
    at_e, whole_e = state
    return before[at_e], whole_e & ((at_e == num_experts) | (owner[at_e] == path_e))

  _, whole_e = jax.lax.while_loop(along, check, (end_e, free_e))
  owner_e = owner[:-1]
  leaves_e &= jnp.concatenate([whole_e, jnp.zeros(1, bool)])[owner_e]
  first_t = jnp.full(num_tokens, num_experts, jnp.int32)
  first_t = first_t.at[jnp.where(leaves_e, token_e, num_tokens)].min(path_e, mode='drop')
  leaves_e &= first_t[token_e] == path_e
  start_e = jnp.where(leaves_e, parent_e, num_experts)
  leaves_e &= rank_within(start_e, num_experts) < excess_e[parent_e]
  goes = jnp.zeros(num_experts + 1, bool).at[jnp.where(leaves_e, owner_e, num_experts)].set(True)
  return goes[owner_e] & (owner_e < num_experts)


def _cheapest_paths(start_e: Array, end_e: Array, loss_ee: Array) -> tuple[Array, Array]:
  """Loss from the nearest start, and the expert before on the way (-1 at a start): Bellman and Ford.

  Of experts farther than all ends it is no less than that of the farthest end, but may not be the least.
  """
  total_e = jnp.where(start_e, 0, jnp.inf).astype(loss_ee.dtype)

  def relax(state):
    total_e, moves_e, count, _ = state
    via_e = (total_e[:, None] + loss_ee).min(0)
    shorter_e = via_e < jnp.minimum(total_e, jnp.where(end_e, total_e, 0).max())
    moves_e = jnp.where(shorter_e, count, moves_e)
    return jnp.where(shorter_e, via_e, total_e), moves_e, count + 1, shorter_e.any()

  state = (
    total_e,
    jnp.zeros(total_e.shape, jnp.int32),
    jnp.ones((), jnp.int32),
    jnp.ones((), bool),
  )
  total_e, moves_e, _, _ = jax.lax.while_loop(lambda state: state[3], relax, state)
  # a path of so many moves goes on from one of fewer
  via_ee = jnp.where(moves_e[:, None] < moves_e[None], total_e[:, None] + loss_ee, jnp.inf)
  return total_e, jnp.where(start_e, -1, _least(via_ee))


@dataclasses.dataclass(frozen=True)
class BaseAffinity:
  """Logits are what weights are made of; in training the assignment selects, outside of it the logits.

  Attributes:
    group: 'sequence' or 'batch', the tokens that share the places.
  """

  group: str

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity('sigmoid', 1)(logits_bse, std, bias_e, context)
    scores = dataclasses.replace(scores, gate=logits_bse)
    if not context.train:
      return scores
    affinity_gte = to_groups(jax.lax.stop_gradient(logits_bse), self.group)
    real_gt = None if context.mask is None else to_groups(context.mask, self.group)
    expert_gt = _balanced_groups(affinity_gte, real_gt)
    expert_bs = from_groups(expert_gt, self.group, (logits_bse.shape[0], logits_bse.shape[1]))
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
    TopKAssign(1, jax.nn.sigmoid),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=False, prefix_safe_eval=True, batch_free=group == 'sequence'),
    choices=1,
  )
