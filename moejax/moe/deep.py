"""Stacked mixtures without choice (Eigen, Ranzato & Sutskever 2013, "Learning factored representations in a deep
mixture of experts")."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Aux, Context, wide_dtype
from moejax.moe.cartesian import side_by_side
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.moe.stats import routing_stats
from moejax.routers.affinity import TokenAffinity
from moejax.routers.dense import assign_all
from moejax.routers.router import Flags, as_batch
from moejax.sizes import check_made_of
from moejax.transformer.linear import product


class GatedSum(nnx.Module):
  """`sum_e g_e(x) relu(x W_e)` with `g = softmax(B relu(x A + a) + b)`.

  Args:
    d_in, d_out: widths.
    num_experts: E.
    gate_width: of the gate's hidden layer.
    dtype: type of the experts' computation; the gate is float32.
    scale: factor on the deviation of the initial experts.
    rngs: source of the initial weights, variance 1 / fan-in; offsets are zero at first.
  """

  def __init__(
    self,
    d_in: int,
    d_out: int,
    num_experts: int,
    gate_width: int,
    *,
    dtype,
    scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    def kernel(*shape: int, scale: float = 1.0) -> nnx.Param:
      init = nnx.initializers.truncated_normal(scale * shape[-2] ** -0.5)
      return nnx.Param(init(rngs.params(), shape, jnp.float32))

    self.kernel = kernel(num_experts, d_in, d_out, scale=scale)
    self.gate_in, self.gate_out = kernel(d_in, gate_width), kernel(gate_width, num_experts)
    self.gate_in_offset = nnx.Param(jnp.zeros(gate_width, jnp.float32))
    self.gate_out_offset = nnx.Param(jnp.zeros(num_experts, jnp.float32))
    self.dtype = jnp.dtype(dtype)

  def __call__(self, x_bsd: Float[Array, 'B S D_in'], context: Context):
    """Output `[B, S, D_out]` and the stats of the gate."""
    wide = lambda weight: weight[...].astype(wide_dtype(x_bsd.dtype))
    h = product(x_bsd.astype(wide_dtype(x_bsd.dtype)), wide(self.gate_in))
    h = jax.nn.relu(h + wide(self.gate_in_offset)[None, None])
    logits_bse = product(h, wide(self.gate_out)) + wide(self.gate_out_offset)[None, None]
    scores = TokenAffinity('softmax', logits_bse.shape[-1])(logits_bse, None, None, context)
    each = jnp.einsum(
      'BSD,EDF->BSEF', x_bsd.astype(self.dtype), self.kernel[...].astype(self.dtype)
    )
    y = jnp.einsum('BSE,BSEF->BSF', scores.gate.astype(self.dtype), jax.nn.relu(each))
    return y, routing_stats(scores, assign_all(scores, context), context)


class DeepMoE(nnx.Module):
  """`y = M_2(M_1(x))`, each `sum_e g_e(x) relu(x W_e)` over all experts: E * E paths of 2 E experts.

  Args:
    d_model: D.
    d_ff: F, width between the two.
    num_experts: E of either.
    gate_width: hidden width of the gates, 50 in the paper.
    losses: as of `MoE`, {'importance': 0.01, 'z': 0.001} by default: `balance` is constant where all experts work.
    dtype: type of the experts' computation.
    out_scale: factor on the deviation of the initial experts of the second.
    rngs: source of the initial parameters.

  Statistics have 2 E entries, those of the second mixture after those of the first. The paper keeps gates balanced by
  closing those that are ahead of the mean, in training at first; here a loss does (`importance`, say). Outputs are from
  0 up, as the paper's: what follows there is the output layer.

  Raises:
    ValueError: gate_width below 1.
  """

  flags = Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True)

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    *,
    gate_width: int = 50,
    losses: Mapping[str, float] | None = None,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, d_ff=d_ff, num_experts=num_experts, gate_width=gate_width)
    losses = {'importance': 0.01, 'z': 0.001} if losses is None else dict(losses)
    check_losses(losses)
    sizes = {'num_experts': num_experts, 'gate_width': gate_width, 'dtype': dtype, 'rngs': rngs}
    self.first = GatedSum(d_model, d_ff, **sizes)
    self.second = GatedSum(d_ff, d_model, scale=out_scale, **sizes)
    self.losses = tuple(sorted(losses.items()))
    self.sizes = (d_model, d_ff, num_experts, gate_width)

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Outputs, zero for padding, and `Aux` of both."""
    x_bsd, context = as_batch(x, context)
    if context.mask is not None:
      x_bsd = jnp.where(context.mask[..., None], x_bsd, 0)
    z_bsf, first = self.first(x_bsd, context)
    y_bsd, second = self.second(z_bsf, context)
    if context.mask is not None:
      y_bsd = jnp.where(context.mask[..., None], y_bsd, 0)
    stats = side_by_side(first, second)
    aux = Aux(weighted_losses(stats, dict(self.losses)), routing_metrics(stats), stats)
    return y_bsd.astype(x.dtype).reshape(x.shape), aux

  def rows_per_token(self, sequence_length: int) -> float:
    """Experts of either mixture: all."""
    return float(self.sizes[2])

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters that works on a token."""
    return 1.0

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part."""
    d_model, d_ff, num_experts, gate = self.sizes
    router = 2 * gate * (d_model + d_ff + 2 * num_experts)
    return {'router': router, 'experts': 2 * 2 * num_experts * d_model * d_ff}
