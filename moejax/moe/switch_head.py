"""SwitchHead: a few attention heads, each with experts for its values and for its outputs.

Csordás et al. 2023, "SwitchHead: accelerating transformers with mixture-of-experts attention", section 2.2. For head n
of token t, with experts e of the head, equations 7 to 10:

  s_n = sigmoid(W_S,n x)   E_S = the k largest   v_n = sum over E_S of s_n[e] W_V,n,e x
  d_n = sigmoid(W_D,n x)   E_D = the k largest   y = sum over n and E_D of d_n[e] W_O,n,e (softmax(q_n K_n^T) V_n)

Queries and keys are those of ordinary heads. Of all projections the paper found these two to gain from experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Aux, Context, Scores, wide_dtype
from moejax.moe.cartesian import side_by_side
from moejax.moe.head_rows import RowWork, by_expert
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.moe.stats import routing_stats
from moejax.routers import Flags
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import as_batch
from moejax.sizes import check_made_of
from moejax.transformer.attention import Visible, attend, visibility
from moejax.transformer.linear import Linear, product
from moejax.transformer.rotary import rotate


class SwitchHead(nnx.Module):
  """Attention whose values and outputs come out of experts of their head.

  Args:
    d_model: D.
    head_dim: H.
    num_experts: E, of each head and either side.
    num_heads: N; in the paper a half to an eighth of the heads of the dense model.
    k: experts of a head that work on a token.
    causal: a position sees itself and those before it.
    losses: as of `MoE`; none in the paper, whose gates do not compete.
    dtype: type of the computation; gates and softmax are float32 always.
    out_scale: factor on the deviation of the initial W_O.
    work: where rows are worked on, see head_rows.py.
    rngs: source of the initial weights, truncated normal with variance 1 / fan-in.

  Training needs neither a balance loss nor dropout of experts (section 3 of the paper). The released code can choose
  the same experts on both sides, and can have experts for queries and keys too, which is not here. Statistics have
  2 N E entries, those of the outputs after those of the values.

  Raises:
    ValueError: a size out of its range, or an unknown loss.
  """

  routed = True
  flags = Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True)

  def __init__(
    self,
    d_model: int,
    head_dim: int,
    num_experts: int,
    *,
    num_heads: int = 2,
    k: int = 2,
    causal: bool = True,
    losses: Mapping[str, float] | None = None,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    work: RowWork = by_expert,
    rngs: nnx.Rngs,
  ):
    sizes = {'d_model': d_model, 'head_dim': head_dim, 'num_experts': num_experts}
    check_made_of(rngs, **sizes, num_heads=num_heads, k=k)
    if k > num_experts:
      raise ValueError(f'k={k} with num_experts={num_experts}: accepted are 1 to {num_experts}')
    losses = dict(losses or {})
    check_losses(losses)
    self.query = Linear(d_model, num_heads * head_dim, dtype=dtype, rngs=rngs)
    self.key = Linear(d_model, num_heads * head_dim, dtype=dtype, rngs=rngs)

    def kernel(*shape: int, scale: float = 1.0) -> nnx.Param:
      init = nnx.initializers.truncated_normal(scale * shape[-2] ** -0.5)
      return nnx.Param(init(rngs.params(), shape, jnp.float32))

    total = num_heads * num_experts
    self.w_value = kernel(total, d_model, head_dim)
    self.w_out = kernel(total, head_dim, d_model, scale=out_scale)
    self.value_router, self.out_router = kernel(d_model, total), kernel(d_model, total)
    self.num_heads, self.num_experts, self.k, self.causal = num_heads, num_experts, k, causal
    self.losses = tuple(sorted(losses.items()))
    self.dtype, self.work = jnp.dtype(dtype), work

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters that works on a token."""
    return self.k / self.num_experts

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part; scores count the whole square as everywhere."""
    d_model, width = self.w_value.shape[-2:]
    return {
      'attention_projections': 2 * d_model * width * self.num_heads * (2 + 2 * self.k),
      'attention_scores': 2 * sequence_length * self.num_heads * 2 * width,
      'attention_router': 2 * 2 * d_model * self.num_heads * self.num_experts,
    }

  def __call__(
    self,
    x: Float[Array, '*batch S D'],
    context: Context | None = None,
    rotation: tuple[Array, Array] | None = None,
    visible: Visible | None = None,
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Outputs, zero for padding, and `Aux`; `rotation` and `visible` as of `Attention`."""
    x_bsd, context = as_batch(x, context)
    if context.mask is not None:
      x_bsd = jnp.where(context.mask[..., None], x_bsd, 0)
      if visible is None:
        visible = visibility(None, context.mask, causal=self.causal)
    values, value_plan = self._choose(x_bsd, self.value_router[...], context)
    outs, out_plan = self._choose(x_bsd, self.out_router[...], context)
    x_bsd = x_bsd.astype(self.dtype)
    heads = lambda z: z.reshape(*x_bsd.shape[:2], self.num_heads, -1)
    q, k = heads(self.query(x_bsd)), heads(self.key(x_bsd))
    if rotation is not None:
      q, k = rotate(q, *rotation), rotate(k, *rotation)
    x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
    v_rh = self._rows(x_td, self.w_value[...], value_plan, 1)
    v = heads(v_rh.reshape(-1, self.k, q.shape[-1]).sum(1))
    seen = attend(q, k, v, visible, causal=self.causal)
    y = self._rows(seen.reshape(-1, seen.shape[-1]), self.w_out[...], out_plan, 2)
    y = y.reshape(-1, self.num_heads * self.k, y.shape[-1]).sum(1)
    stats = side_by_side(
      routing_stats(values, value_plan, context), routing_stats(outs, out_plan, context)
    )
    aux = Aux(weighted_losses(stats, dict(self.losses)), routing_metrics(stats), stats)
    return y.astype(x.dtype).reshape(x.shape), aux

  def _choose(self, x_bsd: Array, kernel: Array, context: Context) -> tuple[Scores, Assignment]:
    """Sigmoid gates of the experts of all heads, and the k best of each head: rows by token, head, choice."""
    wide = wide_dtype(x_bsd.dtype)
    logits_bse = product(x_bsd.astype(wide), kernel.astype(wide), precision='highest')
    scores = TokenAffinity('sigmoid', self.k)(logits_bse, None, None, context)
    gate = scores.gate.reshape(-1, self.num_heads, self.num_experts)
    weight, expert = jax.lax.top_k(gate, self.k)
    first = self.num_experts * jnp.arange(self.num_heads, dtype=jnp.int32)
    expert_r = (expert.astype(jnp.int32) + first[None, :, None]).reshape(-1)
    num_tokens, total = gate.shape[0], logits_bse.shape[-1]
    token_r = jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), self.num_heads * self.k)
    weight_r = weight.reshape(-1)
    if context.mask is not None:
      real_r = context.mask.reshape(-1)[token_r]
      expert_r, weight_r = jnp.where(real_r, expert_r, total), jnp.where(real_r, weight_r, 0)
    return scores, Assignment(token_r, expert_r, weight_r, expert_r, total, num_tokens)

  def _rows(self, row_ri: Array, kernel: Array, plan: Assignment, wide: int) -> Array:
    """Every row of the plan times the matrix of its expert and its weight; zero of dropped rows."""
    y = self.work(row_ri, plan.expert, kernel.astype(row_ri.dtype), wide)
    kept_r = plan.expert < plan.num_experts
    return jnp.where(kept_r[:, None], y, 0) * plan.weight.astype(y.dtype)[:, None]
