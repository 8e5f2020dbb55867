"""Expert choice: every expert takes its C best tokens, so that load is balanced by construction.

Zhou et al. 2022, "Mixture-of-experts with expert choice routing". Groups at the same position, of a fixed number of
sequences, are those of Krajewski et al. 2024, "Scaling laws for fine-grained MoE"; softmax over tokens is of its code.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Assignment, Context, Scores
from moejax.mesh.replicated import replicated
from moejax.routers.capacity import rank_within
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import LinearScorer

GROUPS = ('sequence', 'batch', 'position')


def to_groups(x: Array, group: str, group_size: int | None = None) -> Array:
  """`[B, S, ...] -> [G, T, ...]`: the tokens that compete for the same experts.

  Groups at a position are those of the first T sequences, position by position, then those of the next T.

  Args:
    x: of the batch.
    group: one of GROUPS.
    group_size: T of groups at a position; None, or more than B: all B sequences.

  Raises:
    ValueError: group_size does not divide B.
  """
  if group == 'sequence':
    return x
  if group == 'batch':
    return x.reshape(1, -1, *x.shape[2:])
  num_sequences, num_positions, *rest = x.shape
  size = min(group_size or num_sequences, num_sequences)
  if num_sequences % size:
    raise ValueError(
      f'group_size={group_size} does not divide the {num_sequences} sequences of the batch (or microbatch)'
    )
  parts = x.reshape(-1, size, num_positions, *rest)  # [B, S, ...] -> [B / T, T, S, ...]
  return jnp.swapaxes(parts, 1, 2).reshape(-1, size, *rest)  # -> [B / T * S, T, ...]


def from_groups(x: Array, group: str, shape: tuple[int, ...]) -> Array:
  """Inverse of `to_groups`; `shape` is (B, S)."""
  if group != 'position':
    return x.reshape(*shape, *x.shape[2:])
  parts = x.reshape(-1, shape[1], *x.shape[1:])  # [B / T * S, T, ...] -> [B / T, S, T, ...]
  return jnp.swapaxes(parts, 1, 2).reshape(*shape, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class ExpertAffinity:
  """Softmax over experts, or over the tokens of the routing group.

  Attributes:
    softmax_over: 'experts' or 'tokens'.
    group, group_size: see `to_groups`.
  """

  softmax_over: str
  group: str
  group_size: int | None = None

  def __call__(
    self, logits_bse: Array, std: Array | None, bias: Array | None, context: Context
  ) -> Scores:
    noisy_bse = logits_bse
    if std is not None:
      key = jax.random.fold_in(context.rng, 2)
      noisy_bse = logits_bse + std * jax.random.normal(key, logits_bse.shape, logits_bse.dtype)
    gate_bse = jax.nn.softmax(noisy_bse, -1)
    if self.softmax_over == 'tokens':
      gate_bse = self._over_tokens(noisy_bse, context)
    return Scores(logits_bse, gate_bse, gate_bse, jax.nn.softmax(logits_bse, -1))

  def _over_tokens(self, logits_bse: Array, context: Context) -> Array:
    shape = logits_bse.shape[:2]
    logits_gte = to_groups(logits_bse, self.group, self.group_size)
    where = None
    if context.mask is not None:
      where = to_groups(context.mask, self.group, self.group_size)[..., None]
    gate_gte = jax.nn.softmax(logits_gte, 1, where=where)
    return from_groups(gate_gte, self.group, shape)


@dataclasses.dataclass(frozen=True)
class ExpertChoiceAssign:
  """`Scores -> Assignment`: rows by group, expert, and falling `Scores.select`, which is not negative.

  Attributes:
    factor: c, the mean number of experts a token; C tokens an expert, see `tokens_of_expert`.
    group, group_size: the tokens that compete, see `to_groups`.
    cap: at most so many experts a token (None: any number), by `capped_plan`.
    zeros: whether an expert takes tokens with a score of zero, too, where it has fewer than C others.
  """

  factor: float
  group: str
  cap: int | None = None
  group_size: int | None = None
  zeros: bool = True

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    num_sequences, num_positions, num_experts = scores.gate.shape
    gate_get = jnp.swapaxes(to_groups(scores.gate, self.group, self.group_size), 1, 2)
    num_groups, _, group_size = gate_get.shape
    select_get = jax.lax.stop_gradient(
      jnp.swapaxes(to_groups(scores.select, self.group, self.group_size), 1, 2)
    )
    real_get = None
    if context.mask is not None:
      real_gt = to_groups(context.mask, self.group, self.group_size)
      real_get = jnp.broadcast_to(real_gt[:, None], select_get.shape)
    limit = tokens_of_expert(group_size, num_experts, self.factor)
    if self.cap is not None:
      if self.group != 'sequence':  # groups that span devices
        select_get = replicated(select_get)
      # to three digits: entries next to 1 are ties, in whatever order the sums were taken
      select_get = jnp.round(capped_plan(select_get, limit, self.cap, real_get), 3)
    if real_get is not None:
      select_get = jnp.where(real_get, select_get, -1)
    value_gec, index_gec = jax.lax.top_k(select_get, limit)  # ties: the lowest token first
    weight_gec = jnp.take_along_axis(gate_get, index_gec, -1)
    chosen_gec = jnp.broadcast_to(
      jnp.arange(num_experts, dtype=jnp.int32)[None, :, None], index_gec.shape
    )
    if real_get is not None:
      chosen_gec = jnp.where(jnp.take_along_axis(real_get, index_gec, -1), chosen_gec, num_experts)
    if not self.zeros:
      chosen_gec = jnp.where(value_gec > 0, chosen_gec, num_experts)
    expert_gec = chosen_gec
    if self.cap is not None:
      within_gec = jax.vmap(within_cap, (0, 0, None, None))(
        index_gec, value_gec, self.cap, group_size
      )
      expert_gec = jnp.where(within_gec, chosen_gec, num_experts)
    weight_gec = jnp.where(expert_gec < num_experts, weight_gec, 0)
    first_g, stride = jnp.arange(num_groups, dtype=jnp.int32) * group_size, 1
    chunks = num_sequences if self.group == 'sequence' else 1
    if self.group == 'position':
      chunks, stride = num_sequences // group_size, num_positions
      part_g, position_g = jnp.divmod(jnp.arange(num_groups, dtype=jnp.int32), num_positions)
      first_g = part_g * (group_size * num_positions) + position_g
    token_gec = first_g[:, None, None] + index_gec.astype(jnp.int32) * stride
    return Assignment(
      token=token_gec.reshape(-1),
      expert=expert_gec.reshape(-1),
      weight=weight_gec.reshape(-1),
      chosen=chosen_gec.reshape(-1),
      num_experts=num_experts,
      groups=chunks,
    )


def tokens_of_expert(num_tokens: int, num_experts: int, factor: float) -> int:
  """`C = floor(tokens * factor / experts)`, at least 1 and at most all tokens of the group."""
  return min(num_tokens, max(1, int(num_tokens * factor / num_experts + 1e-9)))


def capped_plan(
  score: Float[Array, 'G E T'],
  limit: int,
  cap: int,
  real: Array | None = None,
  *,
  entropy: float = 1e-3,
  iterations: int = 100,
) -> Float[Array, 'G E T']:
  """Plan A of `max <score, A> + entropy * H(A)`, rows summing to C, columns to at most `cap`, 0 <= A <= 1.

  Zhou et al. 2022, capped expert choice. The optimum is `A = min(1, exp((score + u_e + v_t) / entropy))` with v <= 0;
  u and v are found in turn, each by bisection, until no v moves by a thousandth of `entropy`. Dykstra's projections,
  which the paper uses, have the same limit but move by a few units of `entropy` a round, too slowly for their 100
  rounds. A has no gradient. Padding (`real` False) takes nothing.

  Args:
    score: affinities in [0, 1].
    limit: C, tokens an expert takes.
    cap: b, experts a token may have.
    real: bool `[G, E, T]`.
    entropy: lambda.
    iterations: rounds at most; so many are needed only where `cap` is about the mean number of experts a token.
  """
  log_a = score / jnp.asarray(entropy, score.dtype)
  if real is not None:
    log_a = jnp.where(real, log_a, jnp.asarray(_NOTHING, score.dtype))

  def unsettled(state):
    round_number, moved, _ = state
    return (round_number < iterations) & (moved > 1e-3)

  def one_round(state):
    round_number, _, v = state
    new_v = jnp.minimum(_level(log_a + _level(log_a + v, limit, 2), cap, 1), 0)
    return round_number + 1, jnp.abs(new_v - v).max(), new_v

  start = (jnp.int32(0), jnp.asarray(jnp.inf, score.dtype), jnp.zeros_like(log_a[:, :1]))
  _, _, v = jax.lax.while_loop(unsettled, one_round, start)
  return jnp.exp(jnp.minimum(log_a + _level(log_a + v, limit, 2) + v, 0))


_NOTHING = -1e9
"""log A of padding."""


def _level(log_a: Array, total: int, axis: int) -> Array:
  """The shift x with `sum min(1, exp(log_a + x)) = total` over the axis, which is kept; where less than `total` can
  be had, one that takes all there is."""
  low = jnp.log(jnp.asarray(total / log_a.shape[axis], log_a.dtype)) - log_a.max(
    axis, keepdims=True
  )
  high = -jnp.where(log_a > _NOTHING / 2, log_a, jnp.inf).min(axis, keepdims=True)
  high = jnp.where(jnp.isfinite(high), jnp.maximum(high, low), low)  # padding alone: any will do

  def halve(_, bounds):
    low, high = bounds
    middle = (low + high) / 2
    enough = jnp.exp(jnp.minimum(log_a + middle, 0)).sum(axis, keepdims=True) >= total
    return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

  steps = (
    40 if log_a.dtype == jnp.float64 else 30
  )  # a range of some thousands, to the last digits of log_a
  return jax.lax.fori_loop(0, steps, halve, (low, high))[1]


def within_cap(
  index: Int[Array, 'E C'], value: Float[Array, 'E C'], cap: int, num_tokens: int
) -> Bool[Array, 'E C']:
  """Whether a row is among the `cap` most valued of its token: the plan's rounding may exceed the cap."""
  order_r = jnp.argsort(-value.reshape(-1), stable=True)
  rank_r = rank_within(index.reshape(-1)[order_r].astype(jnp.int32), num_tokens)
  return jnp.zeros(order_r.shape, bool).at[order_r].set(rank_r < cap).reshape(index.shape)


def expert_choice(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  capacity_factor: float = 2.0,
  group: str = 'sequence',
  group_size: int | None = None,
  softmax_over: str = 'experts',
  cap: int | None = None,
  noise_std: float = 0.0,
  init_std: float | None = None,
) -> Router:
  """Expert choice.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    capacity_factor: mean number of experts a token.
    group: tokens that compete: those of a 'sequence', of the whole 'batch', or those at the same 'position'
      of the sequences, which alone is prefix-safe.
    group_size: of group='position', so many consecutive sequences to a group (256 in Krajewski et al., whatever the
      batch), so that routing does not depend on the size of the batch; it divides the batch, or the batch is smaller
      and one group. None: all of the batch, or of the microbatch.
    softmax_over: 'experts' (both papers) or 'tokens' (an option of the code of Krajewski et al.).
    cap: at most so many experts a token, None for no cap. Rows that the plan's rounding puts beyond the cap
      are dropped, and counted: few, unless `cap` is close to `capacity_factor`.
    noise_std, init_std: see `LinearScorer`.

  C counts padding too, so that shapes are static; an expert that runs out of real tokens leaves rows empty.

  Raises:
    ValueError: an option out of its range; when called, a group_size that does not divide the batch.
  """
  if group not in GROUPS:
    raise ValueError(f'group={group!r}: accepted are {", ".join(map(repr, GROUPS))}')
  if group_size is not None and (group != 'position' or group_size < 1):
    raise ValueError(
      f"group_size={group_size} with group={group!r}: accepted are None, or integers from 1 with group='position'"
    )
  if softmax_over not in ('experts', 'tokens'):
    raise ValueError(f"softmax_over={softmax_over!r}: accepted are 'experts', 'tokens'")
  if not capacity_factor > 0:
    raise ValueError(f'capacity_factor={capacity_factor}: accepted are positive numbers')
  if cap is not None and not capacity_factor <= cap <= num_experts:
    raise ValueError(f'cap={cap}: accepted are capacity_factor={capacity_factor} to {num_experts}')
  safe = group == 'position'
  return Router(
    LinearScorer(d_model, num_experts, noise_std=noise_std, init_std=init_std, rngs=rngs),
    ExpertAffinity(softmax_over, group, group_size),
    ExpertChoiceAssign(capacity_factor, group, cap, group_size),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=safe,
      prefix_safe_eval=safe,
      batch_free=group == 'sequence',
      stays_in_sequence=group == 'sequence',
    ),
    choices=min(capacity_factor, num_experts),
  )
