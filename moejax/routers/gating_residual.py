"""Gating residuals: the logits of the layer below enter (Jin et al. 2024, "MoE++: accelerating mixture-of-experts
methods with zero-computation experts", section 3.3)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router, with_flags
from moejax.routers.top_k import token_choice
from moejax.transformer.linear import product

LOGITS = 'gating_residual'
"""Name in `context.state`."""


class ResidualScorer(nnx.Module):
  """`H_l = x W + H_(l-1) R`, H of the layer below in `context.state`, zero at the first.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernels, variance 1 / fan-in.
  """

  def __init__(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
    token = nnx.initializers.truncated_normal(d_model**-0.5)
    below = nnx.initializers.truncated_normal(num_experts**-0.5)
    self.kernel = nnx.Param(token(rngs.params(), (d_model, num_experts), jnp.float32))
    self.residual = nnx.Param(below(rngs.params(), (num_experts, num_experts), jnp.float32))
    self.num_experts = num_experts

  def initial_state(self, shape: tuple[int, int], dtype) -> dict[str, Array]:
    """Zeros: the first layer has no residual."""
    return {LOGITS: jnp.zeros((*shape, self.num_experts), dtype)}

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None, dict[str, Array]]:
    """Logits, which are the state too."""
    dtype = x_bsd.dtype
    logits_bse = product(x_bsd, self.kernel[...].astype(dtype))
    logits_bse = logits_bse + product(context.state[LOGITS], self.residual[...].astype(dtype))
    return logits_bse, None, {LOGITS: logits_bse}


def gating_residual(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  weighting: str = 'softmax_topk',
  **options,
) -> Router:
  """Top-k token choice by `x W + (logits of the layer below) R`, with gradients through both (equation 6).

  The paper has k = 2 and softmax weights as they are, in a layer with `zero_experts`, and `cost_balance` with 0.01. Its
  released code scores by two layers with tanh, makes the zero expert's weight 0 and lets the others sum to one, and
  doubles the experts' inputs in place; none of these is here. The matrix R of the first layer meets zeros.

  Args:
    d_model: D.
    num_experts: E, all that the router chooses among.
    rngs: source of the initial kernels.
    k: choices of a token.
    weighting, options: of `token_choice`.

  Raises:
    ValueError: as `token_choice`.
  """
  scorer = ResidualScorer(d_model, num_experts, rngs=rngs)
  router = token_choice(scorer, num_experts=num_experts, k=k, weighting=weighting, **options)
  return with_flags(router, has_state=True)
