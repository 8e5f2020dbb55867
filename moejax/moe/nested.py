"""Mixture of nested experts: experts are leading slices of one network, and an image has a fixed number of tokens for
each (Jain et al. 2024, "Mixture of nested experts: adaptive processing of visual tokens", MoNE)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.arrays import Assignment, Aux, Context, Scores, wide_dtype
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.moe.stats import routing_stats
from moejax.routers.router import Flags, as_batch, as_given
from moejax.sizes import check_made_of
from moejax.transformer.ffn import FFN
from moejax.transformer.linear import product
from pallas_kernels import hidden

LOGITS, KNOWN = 'nested_logits', 'nested_known'
"""Names in `Context.state`: what the first layer decided, and whether there was one."""


class NestedFFN(nnx.Module):
  """`y = (alpha r_j + 1) FFN_j(x)`: expert j is the first `D / 2^(E - j)` channels of every weight.

  The first mixture of a stack routes, `r = softmax(x W + b)`, and those above do as it did. The largest expert takes
  the tokens it prefers, then the next one of those that are left. alpha is learnt, 0 at first: until it has moved the
  router has no gradient. Numbers of tokens are static, so that small experts cost what they are.

  Args:
    d_model: D, a multiple of 2^(E - 1), as is d_ff.
    d_ff: F of the whole network; expert j has F / 2^(E - j).
    num_experts: E, 4 in the paper.
    effective: fraction of the whole network's width that a token has on average, see `shares_for`. The paper also
      trains with a budget drawn in every step.
    activation, gated, dtype, out_scale: as of `Experts`.
    losses: as of `MoE`; the paper has none.
    rngs: source of the initial parameters.

  Attention is not nested here (in the paper queries and output are, keys and values are whole). Not prefix-safe.

  Raises:
    ValueError: sizes that do not divide, or effective out of its range.
  """

  flags = Flags(prefix_safe_train=False, prefix_safe_eval=False, batch_free=True, has_state=True)

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    *,
    effective: float = 0.5,
    activation: str = 'gelu',
    gated: bool = False,
    losses: Mapping[str, float] | None = None,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, d_ff=d_ff, num_experts=num_experts)
    smallest = 2 ** (num_experts - 1)
    for key, value in (('d_model', d_model), ('d_ff', d_ff)):
      if value % smallest:
        raise ValueError(
          f'{key}={value}: accepted are multiples of {smallest} for {num_experts} nested experts'
        )
    check_losses(dict(losses or {}))
    self.shares = shares_for(effective, num_experts)
    scaled = nnx.initializers.variance_scaling(out_scale**2, 'fan_in', 'truncated_normal')
    options = {'activation': activation, 'gated': gated, 'dtype': dtype, 'rngs': rngs}
    self.ffn = FFN(d_model, d_ff, out_init=scaled, **options)
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.gate_kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), jnp.float32))
    self.gate_offset = nnx.Param(jnp.zeros(num_experts, jnp.float32))
    self.alpha = nnx.Param(jnp.zeros((), jnp.float32))
    self.sizes = (d_model, d_ff, num_experts)
    self.losses = tuple(sorted((losses or {}).items()))

  def initial_state(self, x_bsd: Float[Array, 'B S D']) -> dict[str, Array]:
    """Nothing is decided below the first layer."""
    shape = (*x_bsd.shape[:2], self.sizes[2])
    return {LOGITS: jnp.zeros(shape, wide_dtype(x_bsd.dtype)), KNOWN: jnp.zeros((), bool)}

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Outputs, zero for padding, and `Aux`."""
    x_bsd, context = as_batch(x, context)
    real_bs = jnp.ones(x_bsd.shape[:2], bool) if context.mask is None else context.mask
    x_bsd = jnp.where(real_bs[..., None], x_bsd, 0)
    state = {**self.initial_state(x_bsd), **(context.state or {})}
    wide = wide_dtype(x_bsd.dtype)
    kernel_de = self.gate_kernel[...].astype(wide)
    own_bse = product(x_bsd.astype(wide), kernel_de, precision='highest')
    own_bse = own_bse + self.gate_offset[...].astype(wide)[None, None]
    logits_bse = jnp.where(state[KNOWN], state[LOGITS], own_bse)
    probs_bse = jax.nn.softmax(logits_bse, -1)
    counts = token_counts(self.shares, x_bsd.shape[1])
    expert_bs = prefer_largest(jnp.where(real_bs[..., None], probs_bse, -1), counts)
    r_bs = jnp.take_along_axis(probs_bse, expert_bs[..., None], -1)[..., 0]
    weight_bs = self.alpha[...].astype(wide) * r_bs + 1
    y_bsd = self._work(x_bsd, expert_bs, counts) * weight_bs[..., None].astype(x_bsd.dtype)
    y_bsd = jnp.where(real_bs[..., None], y_bsd, 0)
    stats = self._stats(logits_bse, probs_bse, expert_bs, weight_bs, real_bs, context)
    state |= {LOGITS: logits_bse, KNOWN: jnp.ones((), bool)}
    losses = weighted_losses(stats, dict(self.losses))
    aux = Aux(losses, routing_metrics(stats), stats, as_given(state, x.shape))
    return y_bsd.astype(x.dtype).reshape(x.shape), aux

  def _work(self, x_bsd: Array, expert_bs: Array, counts: tuple[int, ...]) -> Array:
    """Each expert on its tokens, gathered; sorted by expert they are consecutive."""
    d_model, d_ff, num_experts = self.sizes
    order_bs = jnp.argsort(expert_bs, axis=1, stable=True)
    sorted_bsd = jnp.take_along_axis(x_bsd, order_bs[..., None], 1).astype(self.ffn.up.dtype)
    parts, first = [], 0
    for j, count in enumerate(counts):
      cut = 2 ** (num_experts - 1 - j)
      width, inner = d_model // cut, d_ff // cut
      own = sorted_bsd[:, first : first + count, :width]
      into = [layer for layer in (self.ffn.gate, self.ffn.up) if layer is not None]
      pre = tuple(
        product(own, layer.weight[...].astype(own.dtype)[:width, :inner]) for layer in into
      )
      down = self.ffn.down.weight[...].astype(own.dtype)[:inner, :width]
      y = product(hidden(self.ffn.activation, pre), down)
      parts.append(jnp.pad(y, ((0, 0), (0, 0), (0, d_model - width))))
      first += count
    back_bs = jnp.argsort(order_bs, axis=1)
    return jnp.take_along_axis(jnp.concatenate(parts, 1), back_bs[..., None], 1)

  def _stats(self, logits_bse, probs_bse, expert_bs, weight_bs, real_bs, context: Context):
    num_experts, num_tokens = self.sizes[2], expert_bs.size
    expert_r = jnp.where(real_bs, expert_bs, num_experts).reshape(-1).astype(jnp.int32)
    token_r = jnp.arange(num_tokens, dtype=jnp.int32)
    weight_r = jnp.where(real_bs, weight_bs, 0).reshape(-1)
    plan = Assignment(token_r, expert_r, weight_r, expert_r, num_experts, num_tokens)
    return routing_stats(Scores(logits_bse, probs_bse, probs_bse, probs_bse), plan, context)

  def rows_per_token(self, sequence_length: int) -> float:
    """Every token has one expert."""
    return 1.0

  def active_share(self, sequence_length: int) -> float:
    """Mean fraction of the network's weights that works on a token: slices have both sides cut."""
    num_experts = self.sizes[2]
    return sum(share / 4 ** (num_experts - 1 - j) for j, share in enumerate(self.shares))

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part."""
    d_model, d_ff, num_experts = self.sizes
    whole = (2 if self.ffn.gate is None else 3) * 2 * d_model * d_ff
    share = self.active_share(sequence_length)
    return {'router': 2 * d_model * num_experts, 'experts': share * whole}


def prefer_largest(score_bse: Float[Array, 'B S E'], counts: tuple[int, ...]) -> Int[Array, 'B S']:
  """Expert-preferred routing: the last expert takes the `counts[-1]` tokens it scores highest, the one before it the
  best of those that are left, and so on; counts sum to S (algorithm 1). Ties: the lowest token."""
  left_bs = jnp.ones(score_bse.shape[:2], bool)
  expert_bs = jnp.zeros(score_bse.shape[:2], jnp.int32)
  score_bse = jax.lax.stop_gradient(score_bse)
  for expert in reversed(range(1, len(counts))):
    score_bs = jnp.where(left_bs, score_bse[..., expert], -jnp.inf)
    order_bs = jnp.argsort(jnp.argsort(-score_bs, axis=1, stable=True), axis=1)
    taken_bs = order_bs < counts[expert]
    expert_bs = jnp.where(taken_bs, expert, expert_bs)
    left_bs &= ~taken_bs
  return expert_bs


def token_counts(shares: tuple[float, ...], num_tokens: int) -> tuple[int, ...]:
  """Tokens of every expert: rounded down, and what is left to the smallest."""
  larger = [math.floor(share * num_tokens + 1e-9) for share in shares[1:]]
  return (num_tokens - sum(larger), *larger)


def shares_for(effective: float, num_experts: int) -> tuple[float, ...]:
  """Shares c_j of the tokens with `sum_j c_j / 2^(E - j) = effective` and otherwise as even as can be.

  The paper maximises a preference for large experts and 10 times the entropy of c (equation 5); the entropy decides,
  and then `c_j` is proportional to `exp(lambda / 2^(E - j))`.

  Raises:
    ValueError: effective is not above the smallest expert's width and at most 1.
  """
  widths = 2.0 ** -np.arange(num_experts - 1, -1, -1)
  if not widths[0] < effective <= 1:
    raise ValueError(f'effective={effective}: accepted are numbers above {widths[0]}, up to 1')
  if effective == 1:
    return (0.0,) * (num_experts - 1) + (1.0,)
  low, high = -1e4, 1e4
  for _ in range(200):
    middle = (low + high) / 2
    shares = np.exp(middle * (widths - (1 if middle > 0 else widths[0])))
    shares /= shares.sum()
    low, high = (middle, high) if shares @ widths < effective else (low, middle)
  return tuple(float(share) for share in shares)
