"""Routers that hear the whole utterance: an embedding of domain and accent beside the token (You et al. 2021,
"SpeechMoE", and 2022, "SpeechMoE2: mixture-of-experts model with improved routing")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router, required, with_flags
from moejax.routers.scorers import check_from_one
from moejax.routers.top_k import token_choice
from moejax.transformer.linear import product

_half_xavier = nnx.initializers.variance_scaling(0.25, 'fan_avg', 'uniform')  # gain 0.5


class EmbeddingScorer(nnx.Module):
  """`[x; e] W`, e of `context.domain`, which no gradient reaches.

  Args:
    d_model: D.
    num_experts: E.
    width: of e.
    rngs: source of the initial kernel, Xavier uniform with gain 0.5 as in the released code.
  """

  def __init__(self, d_model: int, num_experts: int, width: int, *, rngs: nnx.Rngs):
    shape = (d_model + width, num_experts)
    self.kernel = nnx.Param(_half_xavier(rngs.params(), shape, jnp.float32))
    self.width = width

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits.

    Raises:
      ValueError: without `context.domain`, or with one of another width.
    """
    domain = jax.lax.stop_gradient(required(context, 'domain', 'speech_moe')).astype(x_bsd.dtype)
    if domain.shape[-1] != self.width:
      raise ValueError(
        f'context.domain of shape {domain.shape}: expected a last axis of width={self.width}'
      )
    kernel, split = self.kernel[...].astype(x_bsd.dtype), x_bsd.shape[-1]
    known = domain @ kernel[split:]  # [B, E] of a sequence, [B, S, E] of its positions
    return product(x_bsd, kernel[:split]) + (known[:, None] if known.ndim == 2 else known), None


def speech_moe(
  *, d_model: int, num_experts: int, rngs: nnx.Rngs, k: int = 1, width: int = 16, **options
) -> Router:
  """Top-k token choice by `softmax([x; e] W)`, e an embedding from outside of the mixture.

  In SpeechMoE e is of the frame, `[B, S, W]`, from a small network with a loss of its own; in SpeechMoE2 of the whole
  utterance, `[B, W]`, its domain and accent side by side, from classifiers. Both have k = 1, the probability as weight,
  and the losses `sparsity` and `importance_square`, 0.15 each in the released code. Prefix-safe as far as e is: one of
  the whole utterance has heard its end, so make it of a prefix where the model streams.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernel.
    k: choices of a token.
    width: of e.
    options: of `token_choice`.

  Raises:
    ValueError: width below 1, or as `token_choice`; when called, no `context.domain` of this width.
  """
  check_from_one(width=width)
  scorer = EmbeddingScorer(d_model, num_experts, width, rngs=rngs)
  router = token_choice(scorer, num_experts=num_experts, k=k, **options)
  return with_flags(router, needs=('domain',))
