"""Gating residuals: the logits of the layer below enter (Jin et al. 2024, "MoE++: accelerating mixture-of-experts
methods with zero-computation experts", section 3.3)."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
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


@dataclasses.dataclass(frozen=True)
class AffinityWithoutZeros:
  """`TokenAffinity` of which the last `zeros` experts have no gate: chosen as ever, they leave the weight to others."""

  function: str
  k: int
  zeros: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    has_gate_e = jnp.arange(logits_bse.shape[-1]) < logits_bse.shape[-1] - self.zeros
    return dataclasses.replace(scores, gate=jnp.where(has_gate_e[None, None], scores.gate, 0))


def gating_residual(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  weighting: str | None = None,
  renorm_excluding_zero: int = 0,
  **options,
) -> Router:
  """Top-k token choice by `x W + (logits of the layer below) R`, with gradients through both (equation 6).

  The paper has k = 2 and softmax weights as they are, in a layer with `zero_experts`, and `cost_balance` with 0.01. Its
  released code scores by two layers with tanh, and doubles the experts' inputs in place; neither is here. It also makes
  the zero expert's weight 0 and lets the others sum to one: `renorm_excluding_zero`. The matrix R of the first layer
  meets zeros.

  Args:
    d_model: D.
    num_experts: E, all that the router chooses among.
    rngs: source of the initial kernels.
    k: choices of a token.
    weighting: default 'softmax_topk'; with `renorm_excluding_zero` 'softmax_topk_norm'.
    renorm_excluding_zero: so many zero experts, the last of the layer's, have weight 0 where they are chosen.
    options: of `token_choice`.

  Raises:
    ValueError: renorm_excluding_zero out of its range, or as `token_choice`.
  """
  zeros = renorm_excluding_zero
  if not 0 <= zeros < num_experts:
    raise ValueError(
      f'renorm_excluding_zero={zeros} with num_experts={num_experts}: accepted are 0 to {num_experts - 1}'
    )
  router = token_choice(
    ResidualScorer(d_model, num_experts, rngs=rngs),
    num_experts=num_experts,
    k=k,
    affinity=functools.partial(AffinityWithoutZeros, zeros=zeros) if zeros else TokenAffinity,
    weighting=weighting or ('softmax_topk_norm' if zeros else 'softmax_topk'),
    **options,
  )
  return with_flags(router, has_state=True)
