"""CartesianMoE: two mixtures in a row, so that e + e sub-experts make e * e experts.

Su et al. 2024, "CartesianMoE: boosting knowledge sharing among experts via Cartesian product routing".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Aux, Context, RoutingStats
from moejax.moe.layer import MoE
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.routers.router import Flags
from moejax.sizes import check_made_of
from moejax.transformer.linear import RMSNorm


class CartesianMoE(nnx.Module):
  """`a = A(x)`, `y = a + B(norm(x + a))`, for the block's `x + y`.

  Our reading of summaries of the paper, whose code was not seen: the inner residual carries what A reads.

  Args:
    d_model: D.
    d_ff: F of the layer that this one replaces: sub-experts have F / 2 each, so that k of either mixture cost what k
      of that layer do.
    num_experts: e, sub-experts of either mixture.
    router: as of `MoE`; each mixture has its own, made alike.
    losses: as of `MoE`; see below.
    rngs: source of the initial parameters.
    dtype, options: of `MoE`; `num_shared` shared sub-experts belong to the paper's layer.

  Statistics and metrics have 2 e entries, those of B after those of A: `balance`, `cluster_balance`, `z` and
  `entropy` are then the sums of the losses of the two.

  Raises:
    ValueError: d_ff is odd, or an option of `MoE` out of its range.
  """

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    router='top_k',
    *,
    losses=None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
    **options,
  ):
    check_made_of(rngs, d_model=d_model, d_ff=d_ff, num_experts=num_experts)
    if d_ff % 2:
      raise ValueError(f'd_ff={d_ff}: accepted are even integers')
    losses = {'balance': 0.01, 'z': 0.001} if losses is None else dict(losses)
    check_losses(losses)
    sizes = (d_model, d_ff // 2, num_experts, router)
    self.first = MoE(*sizes, losses={}, dtype=dtype, rngs=rngs, **options)
    self.norm = RMSNorm(d_model, dtype=dtype)
    self.second = MoE(*sizes, losses={}, dtype=dtype, rngs=rngs, **options)
    self.losses = tuple(sorted(losses.items()))

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Outputs, zero for padding, and `Aux` of both mixtures."""
    context = context or Context()
    if context.mask is not None:
      x = jnp.where(context.mask[..., None], x, 0)
    contexts = [context, context]
    if context.rng is not None:
      keys = jax.random.split(context.rng)
      contexts = [dataclasses.replace(context, rng=key) for key in keys]
    a, first = self.first(x, contexts[0])
    contexts[1] = dataclasses.replace(contexts[1], state=first.state)
    b, second = self.second(self.norm(x + a).astype(x.dtype), contexts[1])
    stats = side_by_side(first.stats, second.stats)
    losses = weighted_losses(stats, dict(self.losses))
    return a + b, Aux(losses, routing_metrics(stats), stats, second.state)

  def initial_state(self, x_bsd: Float[Array, 'B S D']) -> dict[str, Array]:
    """As of `MoE`; the second mixture is the layer above the first."""
    return self.first.initial_state(x_bsd)

  @property
  def flags(self) -> Flags:
    """What the router promises."""
    return self.first.flags

  def rows_per_token(self, sequence_length: int) -> float:
    """Mean number of rows in either mixture."""
    return self.first.rows_per_token(sequence_length)

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters that works on a token."""
    return self.first.active_share(sequence_length)

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part: twice those of a mixture."""
    flops = self.first.flops_per_token(sequence_length)
    return {part: 2 * count for part, count in flops.items()}


def side_by_side(first: RoutingStats, second: RoutingStats) -> RoutingStats:
  """Sums of two mixtures on the same tokens as those of one: experts after experts, scalars added; of the tokens that
  no expert worked on the mean."""

  def join(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a, b], -1) if a.ndim else a + b

  both = jax.tree.map(join, first, second)
  clusters = 1 if first.clusters == 1 else first.clusters + second.clusters  # none spans the two
  unrouted = both.unrouted / 2
  return dataclasses.replace(both, tokens=first.tokens, unrouted=unrouted, clusters=clusters)
