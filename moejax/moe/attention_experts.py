"""Attention whose heads are experts (Zhang et al. 2022, "Mixture of attention heads: selecting attention heads per
token", MoA), with stick-breaking weights in place of the softmax as in ModuleFormer (Shen et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Aux, Context
from moejax.moe.head_rows import RowWork, by_expert
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.moe.stats import routing_stats
from moejax.routers import Flags, make_router
from moejax.routers.router import as_batch
from moejax.routers.top_k import check_name
from moejax.sizes import check_made_of
from moejax.transformer.attention import Visible, attend, visibility
from moejax.transformer.linear import Linear, master_dtype
from moejax.transformer.rotary import rotate

KINDS = ('softmax', 'stick_breaking')


class AttentionExperts(nnx.Module):
  """`y_t = sum over the chosen e: w_te attend(x_t W_q,e, K, V) W_o,e`, with one K and one V for all experts.

  Tokens choose by what they are as queries; keys and values are computed once, so that a cache of them is one head wide
  whatever the number of experts.

  Args:
    d_model: D.
    head_dim: H; 128 in the paper's code.
    num_experts: E.
    router: as of `MoE`; a dropless router whose rows are token by token. The paper's weights are
      'softmax_topk_norm_sg' (its released code leaves the division out), its losses `balance` with 0.01 and `z` with
      0.001.
    kind: 'softmax', or 'stick_breaking': a key takes a part of what nearer ones leave.
    causal: a position sees itself and those before it.
    losses: as of `MoE`.
    dtype: type of the computation; router and softmax are float32 always.
    out_scale: factor on the deviation of the initial W_o.
    work: where rows are worked on, see head_rows.py.
    rngs: source of the initial weights, truncated normal with variance 1 / fan-in.

  With the router 'dense' all experts work, weighed by the softmax: BAM's attention with shared keys and values (Zhang
  et al. 2024). The paper's noisy gate and its draw of the last choice in training are routers' options, or not here.

  Raises:
    ValueError: an unknown kind or loss, sticks that are not causal; when called, a plan that is not token by token.
  """

  def __init__(
    self,
    d_model: int,
    head_dim: int,
    num_experts: int,
    router: Mapping[str, Any] | None = None,
    *,
    kind: str = 'softmax',
    causal: bool = True,
    losses: Mapping[str, float] | None = None,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    work: RowWork = by_expert,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, head_dim=head_dim, num_experts=num_experts)
    check_name('kind', kind, KINDS)
    if kind == 'stick_breaking' and not causal:
      raise ValueError('stick_breaking with causal=False: accepted is causal=True')
    losses = {'balance': 0.01, 'z': 0.001} if losses is None else dict(losses)
    check_losses(losses)
    usual = {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk_norm_sg'}
    options = dict(usual if router is None else router)
    name = options.pop('name')
    self.router = make_router(name, d_model=d_model, num_experts=num_experts, rngs=rngs, **options)
    if self.router.feedback is not None:
      raise ValueError(
        f'attention experts with router {name!r} that learns of errors: accepted are others'
      )
    self.key = Linear(d_model, head_dim, dtype=dtype, rngs=rngs)
    self.value = Linear(d_model, head_dim, dtype=dtype, rngs=rngs)

    def kernel(d_in: int, d_out: int, scale: float = 1.0) -> nnx.Param:
      init = nnx.initializers.truncated_normal(scale * d_in**-0.5)
      return nnx.Param(init(rngs.params(), (num_experts, d_in, d_out), jnp.float32))

    self.w_query = kernel(d_model, head_dim)
    self.w_out = kernel(head_dim, d_model, out_scale)
    self.kind, self.causal = kind, causal
    self.losses = tuple(sorted(losses.items()))
    self.dtype, self.work = jnp.dtype(dtype), work

  routed = True

  @property
  def flags(self) -> Flags:
    """What the router promises; without `causal` nothing about later tokens."""
    return self.router.flags

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters (queries and outputs) that works on a token."""
    return min(1.0, self.router.rows_per_token(sequence_length) / self.router.num_experts)

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part; scores count the whole square as everywhere."""
    d_model, width = self.w_query.shape[-2:]
    heads = self.router.rows_per_token(sequence_length)
    return {
      'attention_projections': 2 * d_model * width * (2 * heads + 2),
      'attention_scores': 2 * sequence_length * heads * 2 * width,
      'attention_router': 2 * d_model * self.router.num_experts,
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
    scores, plan = self.router.route(x_bsd, context)
    num_tokens = x_bsd.shape[0] * x_bsd.shape[1]
    if not isinstance(plan, Assignment) or plan.groups != num_tokens:
      raise ValueError(
        'attention experts with this router: accepted are those that choose by token'
      )
    y_td = self._attend(x_bsd.astype(self.dtype), plan, rotation, visible)
    stats = routing_stats(scores, plan, context)
    aux = Aux(weighted_losses(stats, dict(self.losses)), routing_metrics(stats), stats)
    return y_td.astype(x.dtype).reshape(x.shape), aux

  def _attend(self, x_bsd: Array, plan: Assignment, rotation, visible: Visible | None) -> Array:
    """Projections work on rows by expert, attention on rows of a token side by side, as its query heads."""
    num_sequences, num_positions, _ = x_bsd.shape
    x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
    q = self.work(x_td, plan.expert, self.w_query[...].astype(self.dtype), 1)
    q = q.reshape(num_sequences, num_positions, -1, q.shape[-1])
    k, v = self.key(x_bsd)[:, :, None], self.value(x_bsd)[:, :, None]
    if rotation is not None:
      q, k = rotate(q, *rotation), rotate(k, *rotation)
    if self.kind == 'softmax':
      heads = attend(q, k, v, visible, causal=self.causal)
    else:
      heads = stick_breaking(q, k, v, visible, causal=self.causal)
    rows = heads.reshape(plan.expert.size, -1)
    y_rd = self.work(rows, plan.expert, self.w_out[...].astype(self.dtype), 2)
    kept_r = plan.expert < plan.num_experts
    y_rd = jnp.where(kept_r[:, None], y_rd, 0) * plan.weight.astype(y_rd.dtype)[:, None]
    return y_rd.reshape(num_sequences * num_positions, -1, y_rd.shape[-1]).sum(1)


def stick_breaking(
  q: Float[Array, 'B S N H'],
  k: Float[Array, 'B S M H'],
  v: Float[Array, 'B S M H'],
  visible: Visible | None,
  *,
  causal: bool,
) -> Float[Array, 'B S N H']:
  """Attention of which position i gives j the part `sigmoid(l_ij)` of what `j + 1` to i left (ModuleFormer, section
  3.2); a row sums to at most 1. Without positions: nearer keys come first. Keys are of one head here.

  Raises:
    ValueError: causal is False: a stick is broken from the position backwards.
  """
  if not causal:
    raise ValueError('stick_breaking with causal=False: accepted is causal=True')
  wide, size = master_dtype(q.dtype), q.shape[1]
  logits = jnp.einsum('BQNH,BKMH->BNMQK', q, k, preferred_element_type=wide)[:, :, 0]
  logits = logits / jnp.asarray(q.shape[-1] ** 0.5, wide)
  seen = jnp.tri(size, dtype=bool)[None, None]
  if visible is not None:
    seen = seen & visible.keys[:, None]
  weights = broken_sticks(jnp.where(seen, logits, -1e9), seen)
  y = jnp.einsum('BNQK,BKH->BQNH', weights.astype(v.dtype), v[:, :, 0])
  return y if visible is None else jnp.where(visible.rows[:, :, None, None], y, jnp.zeros_like(y))


def broken_sticks(logits: Float[Array, '*batch S S'], seen: Array) -> Float[Array, '*batch S S']:
  """`sigmoid(l_ij) prod over m from j + 1 to i of (1 - sigmoid(l_im))`, by sums of logarithms."""
  left = jnp.where(seen, jax.nn.log_sigmoid(-logits), 0)
  axis = left.ndim - 1
  after = jax.lax.cumsum(left, axis=axis, reverse=True) - left
  return jnp.where(seen, jnp.exp(jax.nn.log_sigmoid(logits) + after), 0)
