"""Every expert on every token, weighted by its softmax probability (Jacobs et al. 1991): the ceiling in quality
and in cost that sparse routers are compared with."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.rows import token_rows
from moejax.routers.scorers import LinearScorer


def assign_all(scores: Scores, context: Context) -> Assignment:
  """Token-major rows, E a token: row `t * E + e` is expert e on token t."""
  shape = scores.gate.shape
  expert_bse = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32)[None, None], shape)
  return token_rows(expert_bse, scores.gate, jnp.ones(shape, bool), shape[-1], context)


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
    choices=num_experts,
  )
