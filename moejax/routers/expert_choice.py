"""Expert choice: every expert takes its C best tokens, so that load is balanced by construction.

Zhou et al. 2022, "Mixture-of-experts with expert choice routing", equations 1-4; the softmax over tokens and the
groups at the same position are those of Krajewski et al. 2024, "Scaling laws for fine-grained MoE", section 3.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import LinearScorer

GROUPS = ('sequence', 'batch', 'position')


def to_groups(x: Array, group: str) -> Array:
  """`[B, S, ...] -> [G, T, ...]`: the tokens that compete for the same experts."""
  if group == 'sequence':
    return x
  if group == 'batch':
    return x.reshape(1, -1, *x.shape[2:])
  return jnp.swapaxes(x, 0, 1)


def from_groups(x: Array, group: str, shape: tuple[int, int]) -> Array:
  """Inverse of `to_groups`; `shape` is (B, S)."""
  return jnp.swapaxes(x, 0, 1) if group == 'position' else x.reshape(*shape, *x.shape[2:])


@dataclasses.dataclass(frozen=True)
class ExpertAffinity:
  """Softmax over experts, or over the tokens of the routing group.

  Attributes:
    softmax_over: 'experts' or 'tokens'.
    group: 'sequence', 'batch' or 'position'.
  """

  softmax_over: str
  group: str

  def __call__(self, logits_bse: Array, std: Array | None, bias: Array | None, context: Context) -> Scores:
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
    logits_gte = to_groups(logits_bse, self.group)
    where = None if context.mask is None else to_groups(context.mask, self.group)[..., None]
    gate_gte = jax.nn.softmax(logits_gte, 1, where=where)
    return from_groups(gate_gte, self.group, shape)


@dataclasses.dataclass(frozen=True)
class ExpertChoiceAssign:
  """`Scores -> Assignment`: rows by group, expert, and falling score.

  Attributes:
    factor: c, the mean number of experts a token; C = max(1, floor(n * c / E)), at most n tokens.
    group: the tokens that compete.
    cap: at most so many experts a token (None: any number), by `capped_plan`.
  """

  factor: float
  group: str
  cap: int | None = None

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    num_sequences, num_positions, num_experts = scores.gate.shape
    gate_get = jnp.swapaxes(to_groups(scores.gate, self.group), 1, 2)
    num_groups, _, group_size = gate_get.shape
    select_get = jax.lax.stop_gradient(gate_get)
    real_get = None
    if context.mask is not None:
      real_get = jnp.broadcast_to(to_groups(context.mask, self.group)[:, None], select_get.shape)
    limit = min(group_size, max(1, int(group_size * self.factor / num_experts + 1e-9)))
    if self.cap is not None:
      select_get = capped_plan(select_get, limit, self.cap, real_get)
    if real_get is not None:
      select_get = jnp.where(real_get, select_get, -1)
    _, index_gec = jax.lax.top_k(select_get, limit)  # ties: the lowest token first
    weight_gec = jnp.take_along_axis(gate_get, index_gec, -1)
    expert_gec = jnp.broadcast_to(
      jnp.arange(num_experts, dtype=jnp.int32)[None, :, None], index_gec.shape
    )
    if real_get is not None:
      real_gec = jnp.take_along_axis(real_get, index_gec, -1)
      expert_gec = jnp.where(real_gec, expert_gec, num_experts)
      weight_gec = jnp.where(real_gec, weight_gec, 0)
    group_g = jnp.arange(num_groups, dtype=jnp.int32)[:, None, None]
    step, stride = (1, num_positions) if self.group == 'position' else (group_size, 1)
    token_gec = group_g * step + index_gec.astype(jnp.int32) * stride
    return Assignment(
      token=token_gec.reshape(-1),
      expert=expert_gec.reshape(-1),
      weight=weight_gec.reshape(-1),
      chosen=expert_gec.reshape(-1),
      num_experts=num_experts,
      groups=num_sequences if self.group == 'sequence' else 1,
    )


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

  Zhou et al. 2022, equations 5-7: Dykstra's alternating projections in the Kullback-Leibler geometry, here in
  the log domain. A has no gradient. Padding (`real` False) takes nothing.

  Args:
    score: affinities in [0, 1].
    limit: C, tokens an expert takes.
    cap: b, experts a token may have.
    real: bool `[G, E, T]`.
    entropy: lambda.
    iterations: rounds of projections.
  """
  lowest = jnp.asarray(-1e9, score.dtype)
  log_a = score / jnp.asarray(entropy, score.dtype)
  if real is not None:
    log_a = jnp.where(real, log_a, lowest)
  log_limit, log_cap = jnp.log(jnp.asarray(limit, score.dtype)), jnp.log(jnp.asarray(cap, score.dtype))

  def rows(a):
    return a + log_limit - jax.nn.logsumexp(a, 2, keepdims=True)

  def columns(a):
    return a + jnp.minimum(log_cap - jax.nn.logsumexp(a, 1, keepdims=True), 0)

  def entries(a):
    return jnp.minimum(a, 0)

  def round_of_projections(_, carry):
    a, q_columns, q_entries = carry
    a = rows(a)  # affine: needs no correction
    new = columns(a + q_columns)
    a, q_columns = new, a + q_columns - new
    new = entries(a + q_entries)
    return new, q_columns, a + q_entries - new

  zeros = jnp.zeros_like(log_a)
  log_a, _, _ = jax.lax.fori_loop(0, iterations, round_of_projections, (log_a, zeros, zeros))
  return jnp.exp(log_a)


def expert_choice(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  capacity_factor: float = 2.0,
  group: str = 'sequence',
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
      of all sequences, which alone is prefix-safe.
    softmax_over: 'experts' (Zhou et al.) or 'tokens' (Krajewski et al.).
    cap: at most so many experts a token, up to the accuracy of `capped_plan`; None for no cap.
    noise_std, init_std: see `LinearScorer`.

  C counts padding too, so that shapes are static; an expert that runs out of real tokens leaves rows empty.

  Raises:
    ValueError: an option out of its range.
  """
  if group not in GROUPS:
    raise ValueError(f'group={group!r}: accepted are {", ".join(map(repr, GROUPS))}')
  if softmax_over not in ('experts', 'tokens'):
    raise ValueError(f"softmax_over={softmax_over!r}: accepted are 'experts', 'tokens'")
  if not capacity_factor > 0:
    raise ValueError(f'capacity_factor={capacity_factor}: accepted are positive numbers')
  if cap is not None and not capacity_factor <= cap <= num_experts:
    raise ValueError(f'cap={cap}: accepted are capacity_factor={capacity_factor} to {num_experts}')
  safe = group == 'position'
  return Router(
    LinearScorer(d_model, num_experts, noise_std=noise_std, init_std=init_std, rngs=rngs),
    ExpertAffinity(softmax_over, group),
    ExpertChoiceAssign(capacity_factor, group, cap),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=safe, prefix_safe_eval=safe, batch_free=group == 'sequence'),
  )
