"""Pre-gated mixtures: every layer chooses the experts of the next one, which can be fetched meanwhile (Hwang et al.
2023, "Pre-gated MoE: an algorithm-system co-design for fast and scalable mixture-of-expert inference")."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router, with_flags
from moejax.routers.top_k import token_choice
from moejax.transformer.linear import product

AHEAD, KNOWN = 'pre_gated_logits', 'pre_gated_known'
"""Names in `context.state`: logits made below, and whether there is a layer below."""


class AheadScorer(nnx.Module):
  """Logits that the layer below made, at the first layer its own `x W`; leaves `x W_next` for the layer above.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernels, variance 1 / D.
  """

  def __init__(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), jnp.float32))
    self.next_kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), jnp.float32))
    self.num_experts = num_experts

  def initial_state(self, shape: tuple[int, int], dtype) -> dict[str, Array]:
    """Nothing is known below the first layer."""
    return {AHEAD: jnp.zeros((*shape, self.num_experts), dtype), KNOWN: jnp.zeros((), bool)}

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None, dict[str, Array]]:
    """Logits and the state."""
    own_bse, next_bse = (
      product(x_bsd, kernel[...].astype(x_bsd.dtype)) for kernel in (self.kernel, self.next_kernel)
    )
    logits_bse = jnp.where(context.state[KNOWN], context.state[AHEAD], own_bse)
    return logits_bse, None, {AHEAD: next_bse, KNOWN: jnp.ones((), bool)}


def pre_gated(*, d_model: int, num_experts: int, rngs: nnx.Rngs, k: int = 1, **options) -> Router:
  """Top-k token choice by logits of the mixture below, one layer ahead (section 4.1).

  The paper fine-tunes Switch (k = 1, the same weights and losses) with 2,048 steps at learning rate 1e-4. There the
  first layer has two gates and the last none; here all layers are alike, so that they stack: the gate of their own is
  used, and learns, in the first alone, and the last layer's gate for the next one meets nobody.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernels.
    k: choices of a token.
    options: of `token_choice`.

  Raises:
    ValueError: as `token_choice`.
  """
  scorer = AheadScorer(d_model, num_experts, rngs=rngs)
  return with_flags(token_choice(scorer, num_experts=num_experts, k=k, **options), has_state=True)
