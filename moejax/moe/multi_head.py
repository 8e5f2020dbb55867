"""MH-MoE: every token is cut into sub-tokens that are routed apart.

Wu et al. 2024, "Multi-head mixture-of-experts".
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Aux, Context
from moejax.moe.layer import MoE
from moejax.routers.router import Flags, Router, previous_ids
from moejax.sizes import check_made_of
from moejax.transformer.linear import Linear

_half_xavier = nnx.initializers.variance_scaling(0.5, 'fan_avg', 'uniform')  # gain 1 / sqrt(2)
_xavier = nnx.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')


class MultiHeadMoE(nnx.Module):
  """`merge(moe(split(x)))`: x W_h + b is cut into h sub-tokens of width D / h, which share router and experts.

  Args:
    d_model: D.
    d_ff: F, hidden width of an expert; an expert reads and writes D / h, so that h times a plain layer's F costs what
      that layer does.
    num_experts: E.
    router: as of `MoE`; it sees sequences of h S sub-tokens, those of a token side by side.
    heads: h, a divisor of D.
    dtype: type of the computation.
    out_scale: factor on the standard deviation of the experts' initial output weights.
    rngs: source of the initial parameters; W_h and W_m as in the released code Xavier uniform, gain 1 / sqrt(2) and 1.
    options: of `MoE`.

  Statistics count sub-tokens. Prefix-safe and batch-free as the router is.

  Raises:
    ValueError: heads does not divide D, or an option of `MoE` out of its range.
  """

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    router='top_k',
    *,
    heads: int = 4,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
    **options,
  ):
    check_made_of(rngs, d_model=d_model, d_ff=d_ff, num_experts=num_experts, heads=heads)
    if d_model % heads:
      raise ValueError(f'heads={heads} does not divide d_model={d_model}')
    linear = {'use_bias': True, 'dtype': dtype, 'rngs': rngs}
    self.split = Linear(d_model, d_model, init=_half_xavier, **linear)
    self.moe = MoE(
      d_model // heads,
      d_ff,
      num_experts,
      router,
      dtype=dtype,
      out_scale=out_scale,
      rngs=rngs,
      **options,
    )
    self.merge = Linear(d_model, d_model, init=_xavier, **linear)
    self.heads = heads

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Outputs, zero for padding, and `Aux` of the sub-tokens."""
    *lead, num_positions, width = x.shape
    context = context or Context()
    parts = self.split(x).reshape(*lead, num_positions * self.heads, width // self.heads)
    y, aux = self.moe(parts, repeat_positions(context, self.heads, x.ndim))
    y = self.merge(y.reshape(x.shape)).astype(x.dtype)
    if context.mask is not None:
      y = jnp.where(context.mask[..., None], y, 0)
    return y, aux

  def initial_state(self, x_bsd: Float[Array, 'B S D']) -> dict[str, Array]:
    """As of `MoE`, of sub-tokens."""
    b, s, d = x_bsd.shape
    return self.moe.initial_state(x_bsd.reshape(b, s * self.heads, d // self.heads))

  @property
  def router(self) -> Router:
    """The router of the sub-tokens."""
    return self.moe.router

  @property
  def flags(self) -> Flags:
    """What the router promises."""
    return self.moe.flags

  def rows_per_token(self, sequence_length: int) -> float:
    """Mean number of rows of all sub-tokens of a token."""
    return self.heads * self.moe.rows_per_token(sequence_length * self.heads)

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters that works on a token at most: when its sub-tokens choose apart."""
    return min(1.0, self.heads * self.moe.active_share(sequence_length * self.heads))

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part."""
    flops = self.moe.flops_per_token(sequence_length * self.heads)
    flops = {part: self.heads * count for part, count in flops.items()}
    return flops | {'split_and_merge': 2 * 2 * self.split.weight.shape[-1] ** 2}


def repeat_positions(context: Context, times: int, ndim: int = 3) -> Context:
  """The context of tokens x of so many axes, of which every position stands `times` times side by side."""
  arrays = {name: getattr(context, name) for name in ('mask', 'token_ids', 'positions', 'maps')}
  arrays['previous_ids'] = previous_ids(context)
  repeated: dict[str, Any] = {
    name: jnp.repeat(array, times, -1) for name, array in arrays.items() if array is not None
  }
  if context.domain is not None and context.domain.ndim == ndim:  # one for every position
    repeated['domain'] = jnp.repeat(context.domain, times, -2)
  return dataclasses.replace(context, **repeated)
