"""Routing statistics: scores and an assignment (or soft plan) -> `RoutingStats`, sums over real tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import Assignment, Context, RoutingStats, Scores, SoftPlan
from moejax.moe.entropy import entropy_terms


def routing_stats(
  scores: Scores,
  plan: Assignment | SoftPlan,
  context: Context,
  costs: tuple[float, ...] | None = None,
) -> RoutingStats:
  """Sums over the real tokens of one call. Gradients flow through `prob_e`, `load_e`, `z`, `entropy`, `sparsity`,
  `local_g` and the probabilities of `sequence_balance`; counts have none. `costs` are relative, one an expert."""
  mask_bs = jnp.ones(scores.probs.shape[:2], bool) if context.mask is None else context.mask
  probs_bse = jnp.where(mask_bs[..., None], scores.probs, 0)
  if isinstance(plan, Assignment):
    chosen_be, kept_e, weight_e, unrouted = _count_rows(plan, mask_bs, probs_bse.dtype)
  else:
    chosen_be = jax.lax.stop_gradient(plan.combine.sum((1, 3)))
    kept_e = weight_e = chosen_be.sum(0)
    unrouted = jnp.zeros((), probs_bse.dtype)
  chosen_be = _average_nulls(chosen_be, scores.nulls)
  load_bse = scores.load
  tokens = mask_bs.sum(dtype=probs_bse.dtype)
  partition_bs = scores.partition
  if partition_bs is None:
    partition_bs = jax.nn.logsumexp(scores.logits, -1)
  home_g, local_g = _at_home(probs_bse.sum(1), mask_bs, scores.clusters)
  return RoutingStats(
    tokens=tokens,
    chosen_e=chosen_be.sum(0),
    kept_e=kept_e,
    prob_e=probs_bse.sum((0, 1)),
    weight_e=weight_e,
    load_e=chosen_be.sum(0)
    if load_bse is None
    else jnp.where(mask_bs[..., None], load_bse, 0).sum((0, 1)),
    z=jnp.where(mask_bs, partition_bs**2, 0).sum(),
    entropy=entropy_terms(probs_bse).sum(),
    sequence_balance=_sequence_balance(chosen_be, probs_bse.sum(1), mask_bs),
    unrouted=unrouted,
    sparsity=_sparsity(probs_bse, mask_bs),
    cost_e=None if costs is None else tokens * jnp.asarray(costs, probs_bse.dtype),
    guidance=None if scores.guidance is None else jnp.where(mask_bs, scores.guidance, 0).sum(),
    home_g=home_g,
    local_g=local_g,
    clusters=scores.clusters,
  )


def _average_nulls(chosen_be: Array, nulls: int) -> Array:
  """Every null expert counts the mean of all: a balance loss sees how much they take, not which of them."""
  if nulls < 2:
    return chosen_be
  null_be = chosen_be[:, -nulls:]
  mean_be = jnp.broadcast_to(null_be.mean(1, keepdims=True), null_be.shape)
  return jnp.concatenate([chosen_be[:, :-nulls], mean_be], 1)


def _sparsity(probs_bse: Array, mask_bs: Array) -> Array:
  square_bs = (probs_bse * probs_bse).sum(-1)
  # probabilities of sigmoids may all come to 0
  square_bs = jnp.where(mask_bs & (square_bs > 0), square_bs, 1)
  return (probs_bse.sum(-1) * jax.lax.rsqrt(square_bs)).sum()


def _at_home(
  prob_be: Array, mask_bs: Array, clusters: int
) -> tuple[Array, Array] | tuple[None, None]:
  """Tokens at home with each cluster, and the probabilities that they give to it; None of a single cluster."""
  if clusters == 1:
    return None, None
  num_sequences = prob_be.shape[0]
  home_b = jnp.arange(num_sequences) * clusters // num_sequences
  is_home_bg = jax.nn.one_hot(home_b, clusters, dtype=prob_be.dtype)
  prob_bg = prob_be.reshape(num_sequences, clusters, -1).sum(-1)
  count_b = mask_bs.sum(1, dtype=prob_be.dtype)
  return (is_home_bg * count_b[:, None]).sum(0), (is_home_bg * prob_bg).sum(0)


def _count_rows(plan: Assignment, mask_bs: Array, dtype) -> tuple[Array, Array, Array, Array]:
  """Rows that wanted each expert, by sequence; rows and weight each expert got; tokens that got none."""
  num_sequences, num_positions = mask_bs.shape
  bins = plan.num_experts + 1  # the last one takes the dropped rows
  kept_r = plan.expert < plan.num_experts
  slot_r = plan.token // num_positions * bins + plan.chosen
  chosen_be = jnp.bincount(slot_r, length=num_sequences * bins).reshape(num_sequences, bins)[:, :-1]
  kept_e = jnp.bincount(plan.expert, length=bins)[:-1]
  weight_r = jax.lax.stop_gradient(plan.weight).astype(dtype)
  weight_e = jax.ops.segment_sum(weight_r, plan.expert, bins)[:-1]
  routed_t = jnp.zeros(mask_bs.size, bool).at[plan.token].max(kept_r)
  unrouted = (mask_bs.reshape(-1) & ~routed_t).sum(dtype=dtype)
  return chosen_be.astype(dtype), kept_e.astype(dtype), weight_e, unrouted


def _sequence_balance(chosen_be: Array, prob_be: Array, mask_bs: Array) -> Array:
  """Sum over sequences of its tokens times `E sum_e f_e P_e` (DeepSeek-V3, equations 17-20)."""
  num_experts = chosen_be.shape[1]
  fraction_be = chosen_be / jnp.maximum(chosen_be.sum(1, keepdims=True), 1)
  # tokens of the sequence times P_e is the plain sum of probabilities
  return jnp.asarray(num_experts, prob_be.dtype) * (fraction_be * prob_be).sum()
