"""Every expert on every token, weighted by its softmax probability (Jacobs et al. 1991): the ceiling in quality
and in cost that sparse routers are compared with."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import LinearScorer


def assign_all(scores: Scores, context: Context) -> Assignment:
  """Token-major rows, E a token: row `t * E + e` is expert e on token t."""
  num_sequences, num_positions, num_experts = scores.gate.shape
  num_tokens = num_sequences * num_positions
  expert_te = jnp.tile(jnp.arange(num_experts, dtype=jnp.int32)[None], (num_tokens, 1))
  weight_te = scores.gate.reshape(num_tokens, num_experts)
  if context.mask is not None:
    mask_te = jnp.broadcast_to(context.mask.reshape(-1, 1), expert_te.shape)
    expert_te = jnp.where(mask_te, expert_te, num_experts)
    weight_te = jnp.where(mask_te, weight_te, 0)
  return Assignment(
    token=jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), num_experts),
    expert=expert_te.reshape(-1),
    weight=weight_te.reshape(-1),
    chosen=expert_te.reshape(-1),
    num_experts=num_experts,
    groups=num_tokens,
  )


def dense(
  *, d_model: int, num_experts: int, rngs: nnx.Rngs, init_std: float | None = None
) -> Router:
  """All experts, softmax weights.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    init_std: see `LinearScorer`.
  """
  return Router(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    TokenAffinity('softmax', num_experts),
    assign_all,
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
  )
