"""One pre-norm transformer block: attention, then a dense feed-forward layer or a mixture of experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, RoutingStats
from moejax.transformer.attention import Visible
from moejax.transformer.ffn import FFN
from moejax.transformer.linear import RMSNorm

HEADS = 100
"""Stream of the noise of heads that are experts, apart from those of moejax/routers."""


class Block(nnx.Module):
  """`x + attention(norm(x))`, then `x + f(norm(x))`, where f is either `ffn` or `moe`.

  Dense layers stay under the name `ffn` and mixtures under `moe`, so that a parameter's path says which
  it is. An output norm of the mixture belongs to the mixture. Attention is called as
  `Attention` is; one whose heads are experts (`routed`) as `AttentionExperts`.

  Raises:
    ValueError: unless exactly one of ffn and moe is given.
  """

  def __init__(
    self,
    d_model: int,
    *,
    attention: nnx.Module,
    ffn: FFN | None = None,
    moe: nnx.Module | None = None,
    norm: Callable[..., nnx.Module] = RMSNorm,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    if (ffn is None) == (moe is None):
      raise ValueError(f'ffn={ffn} and moe={moe}: a block has exactly one of them')
    self.attention_norm = norm(d_model, dtype=dtype, rngs=rngs)
    self.attention = attention
    self.ffn_norm = norm(d_model, dtype=dtype, rngs=rngs)
    self.ffn = ffn
    self.moe = moe

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    context: Context,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    visible: Visible | None = None,
  ) -> tuple[Float[Array, 'B S D'], tuple[RoutingStats, ...], dict[str, Array]]:
    """The block's output, the routing sums of its routed layers, and the state for the block above."""
    x, stats = self.attend(x, context, rotation, visible)
    h = self.ffn_norm(x)
    state = context.state or {}
    if self.moe is None:
      return x + self.ffn(h), stats, state
    y, aux = self.moe(h, context)
    return x + y, (*stats, aux.stats), state | (aux.state or {})

  def attend(
    self,
    x: Float[Array, 'B S D'],
    context: Context,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    visible: Visible | None = None,
  ) -> tuple[Float[Array, 'B S D'], tuple[RoutingStats, ...]]:
    """The first half of the block, and the routing sums of its heads where these are experts."""
    h = self.attention_norm(x)
    if not getattr(self.attention, 'routed', False):
      return x + self.attention(h, rotation, visible), ()
    if context.rng is not None:  # the mixture's router draws noise of this key
      context = dataclasses.replace(context, rng=jax.random.fold_in(context.rng, HEADS))
    y, aux = self.attention(h, context, rotation, visible)
    return x + y, (dataclasses.replace(aux.stats, part='attention'),)

  def initial_state(self, x: Float[Array, 'B S D']) -> dict[str, Array]:
    """What the block finds in `context.state` if nothing below it has left anything there."""
    return self.moe.initial_state(x) if hasattr(self.moe, 'initial_state') else {}
