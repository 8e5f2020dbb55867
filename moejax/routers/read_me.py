"""Read-ME: one router, apart from the layers, chooses the experts of all of them (Cai et al. 2024, "Read-ME:
refactorizing LLMs as router-decoupled mixture of experts with system co-design")."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, full_precision, wide_dtype
from moejax.routers.router import Router, with_flags
from moejax.routers.scorers import check_from_one
from moejax.routers.top_k import token_choice
from moejax.transformer.attention import Attention
from moejax.transformer.ffn import FFN
from moejax.transformer.linear import Linear, RMSNorm

LOGITS = 'read_me'
"""Name in `context.shared`."""


class ApartRouter(nnx.Module):
  """A transformer of one narrow layer over the embedded tokens: the logits of all routers.

  Args:
    d_model: D.
    num_experts: E.
    width: of the transformer; one head, hidden width 4 times as much.
    causal: every token sees those before it alone.
    rngs: source of the initial parameters.

  Positions are those that the embedded tokens hold, if any; padding is seen by nobody.
  """

  def __init__(self, d_model: int, num_experts: int, *, width: int, causal: bool, rngs: nnx.Rngs):
    self.enter = Linear(d_model, width, rngs=rngs)
    self.attention_norm = RMSNorm(width)
    self.attention = Attention(width, 1, 1, width, causal=causal, rngs=rngs)
    self.ffn_norm = RMSNorm(width)
    self.ffn = FFN(width, 4 * width, activation='gelu', gated=False, rngs=rngs)
    self.norm = RMSNorm(width)
    self.kernel = nnx.Param(
      nnx.initializers.truncated_normal(width**-0.5)(
        rngs.params(), (width, num_experts), jnp.float32
      )
    )

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context, visible=None
  ) -> dict[str, Array]:
    """Logits `[B, S, E]`, float32 or wider."""
    with full_precision():
      h = self.enter(x_bsd.astype(wide_dtype(x_bsd.dtype)))
      h = h + self.attention(self.attention_norm(h), None, visible)
      h = self.norm(h + self.ffn(self.ffn_norm(h)))
      return {LOGITS: h @ self.kernel[...].astype(h.dtype)}


class SharedScorer(nnx.Module):
  """Logits out of `context.shared`."""

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """The logits.

    Raises:
      ValueError: there are none.
    """
    if context.shared is None or LOGITS not in context.shared:
      raise ValueError(
        'read_me needs the logits of a stack: pass moe_shared to the model, or context.shared'
      )
    return context.shared[LOGITS].astype(x_bsd.dtype), None


def read_me(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 1,
  width: int = 64,
  causal: bool = True,
  **options,
) -> Router:
  """Top-k token choice by logits that are equal in all layers and known before the first one runs (section 3.2).

  A transformer of one layer, 64 wide in the paper, belongs to the stack and not to the layers. The paper makes its
  experts of a trained model, as masks of the hidden units, and trains the router to name the mask closest to a token's
  activations (0.75 cross-entropy with label smoothing 0.5 and 0.25 distillation); here it learns from the task,
  through the weights.

  Args:
    d_model: D.
    num_experts: E; 8 in the paper.
    rngs: unused, the layers have no parameters.
    k: choices of a token.
    width, causal: of the stack's router, see `ApartRouter`.
    options: of `token_choice`.

  Raises:
    ValueError: width below 1, or as `token_choice`; when called, logits that nobody shares.
  """
  check_from_one(width=width)
  router = token_choice(SharedScorer(), num_experts=num_experts, k=k, **options)
  safe = {
    'prefix_safe_train': router.flags.prefix_safe_train and causal,
    'prefix_safe_eval': router.flags.prefix_safe_eval and causal,
  }
  return with_flags(router, **safe, trains_router=False, needs=('shared',), needs_past=True)


def read_me_shared(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  width: int = 64,
  causal: bool = True,
  **options,
) -> ApartRouter:
  """What a stack of such routers shares; arguments as of `read_me`."""
  return ApartRouter(d_model, num_experts, width=width, causal=causal, rngs=rngs)
