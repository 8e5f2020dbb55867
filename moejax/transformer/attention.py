"""Multi-head and grouped-query self-attention, with packed documents and padding."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.sizes import check_made_of
from moejax.transformer.linear import Init, Linear, RMSNorm, fan_in_init, master_dtype
from moejax.transformer.relative import RelativeBias
from moejax.transformer.rotary import rotate

IMPLEMENTATIONS = (None, 'cudnn', 'pieces')
# Queries of a piece are at least so many, and a sequence has at most so many pieces: all are traced.
PIECE, PIECES = 128, 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
  """Who may attend to whom, beyond causality.

  Attributes:
    keys: bool `[B, S, S]`, True where query s (second axis) may attend to key (third axis).
    rows: bool `[B, S]`, False for queries that may attend to nothing; their output is zero.
  """

  keys: Array
  rows: Array


def visibility(
  segment_ids: Int[Array, 'B S'] | None, mask: Bool[Array, 'B S'] | None, *, causal: bool
) -> Visible | None:
  """What packed documents (`segment_ids`) and padding (`mask`, True for real tokens) leave visible.

  None when both are None: then nothing but causality hides a key.
  """
  if segment_ids is None and mask is None:
    return None
  if segment_ids is None:
    keys = jnp.broadcast_to(mask[:, None, :], (*mask.shape, mask.shape[1]))
  else:
    keys = segment_ids[:, :, None] == segment_ids[:, None, :]
    keys = keys if mask is None else keys & mask[:, None, :]
  size = keys.shape[-1]
  reachable = keys & jnp.tri(size, dtype=bool)[None, :, :] if causal else keys
  return Visible(keys=keys, rows=jnp.any(reachable, axis=-1))


def attend(
  q: Float[Array, 'B S N H'],
  k: Float[Array, 'B S M H'],
  v: Float[Array, 'B S M H_v'],
  visible: Visible | None,
  *,
  causal: bool,
  bias: Float[Array, 'N S S'] | None = None,
  implementation: str | None = None,
) -> Float[Array, 'B S N H_v']:
  """Softmax attention; query head n reads key and value head n // (N / M). The softmax is float32 or wider.

  `bias` is added to the scores of every query (second axis) and key (third), after their division by the root of H.
  `implementation='cudnn'` asks for cuDNN's flash attention (NVIDIA, 16-bit inputs) and never falls back. 'pieces'
  leaves out most of what causality hides (`in_pieces`); without causality it is as None. Both write the formula out and
  do not leave it to `jax.nn.dot_product_attention`, whose softmax is float32 even of float64 inputs, and whose gradient
  of bfloat16 fails under strict dtype promotion.
  """
  if implementation == 'cudnn':
    mask = None if visible is None else visible.keys[:, None, :, :]  # [B, 1, S, S]
    added = None if bias is None else bias[None, :, :, :].astype(q.dtype)
    y = jax.nn.dot_product_attention(
      q, k, v, bias=added, mask=mask, is_causal=causal, implementation='cudnn'
    )
  elif implementation == 'pieces' and causal:
    y = in_pieces(q, k, v, visible, bias)
  else:
    y = softmax_attention(q, k, v, visible, bias, causal=causal)
  return y if visible is None else jnp.where(visible.rows[:, :, None, None], y, jnp.zeros_like(y))


def in_pieces(q, k, v, visible, bias=None):
  """As `softmax_attention`, causal: queries in pieces, each on the keys up to its last.

  p pieces have (p + 1) / 2p of the products. A sequence of `PIECE` tokens or fewer is one.
  """
  s = q.shape[1]
  size = PIECE * -(-s // (PIECE * PIECES))
  parts = []
  for first in range(0, s, size):
    end = min(first + size, s)
    some = visible and Visible(visible.keys[:, first:end, :end], visible.rows[:, first:end])
    added = None if bias is None else bias[:, first:end, :end]
    heads = q[:, first:end], k[:, :end], v[:, :end]
    parts.append(softmax_attention(*heads, some, added, causal=True))
  return jnp.concatenate(parts, axis=1)


def softmax_attention(q, k, v, visible, bias=None, *, causal):
  """As `attend`, but for rows that may attend to nothing: these average over all values.

  Queries may be fewer than keys; then they are the last ones.
  """
  b, s, n, h = q.shape
  t, m = k.shape[1:3]
  wide = master_dtype(q.dtype)
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  q = q.reshape(b, m, (n // m) * s, h)  # a key head's queries are rows of one matrix
  scores = jnp.einsum('bmqh,bmkh->bmqk', q, k, preferred_element_type=wide) / h**0.5
  scores = scores.reshape(b, n, s, t)
  if bias is not None:
    scores = scores + bias[None, :, :, :].astype(wide)
  if causal:
    earlier = jnp.tri(s, t, t - s, dtype=bool)
    scores = jnp.where(earlier[None, None, :, :], scores, jnp.finfo(wide).min)
  if visible is not None:
    scores = jnp.where(visible.keys[:, None, :, :], scores, jnp.finfo(wide).min)
  weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
  total = weights.sum(axis=-1).reshape(b, m, -1, 1)
  weights = weights.astype(v.dtype).reshape(b, m, -1, t)
  # Divided here, not S times as often: the gradient has no sum over the weights either.
  y = jnp.matmul(weights, v, preferred_element_type=wide) / total  # [B, M, N / M * S, H]
  return y.astype(v.dtype).reshape(b, n, s, -1).transpose(0, 2, 1, 3)


class Attention(nnx.Module):
  """Self-attention (Vaswani et al. 2017) with grouped key and value heads (Ainslie et al. 2023).

  `qk_norm`: RMSNorm over each query and key head before rotation (Henry et al. 2020; Dehghani et al. 2023);
  `qk_norm_scope='all'`: over all heads of a token at once (OLMoE, Muennighoff et al. 2024).
  `relative`: biases by distance (relative.py), in place of a rotation or beside it.

  Raises:
    ValueError: if num_kv_heads does not divide num_heads, or an unknown `implementation` (of `attend`).
  """

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    causal: bool,
    qk_norm: bool = False,
    qk_norm_scope: Literal['head', 'all'] = 'head',
    use_bias: bool = False,
    relative: bool = False,
    implementation: str | None = None,
    out_init: Init = fan_in_init,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    sizes = {'d_model': d_model, 'num_heads': num_heads, 'num_kv_heads': num_kv_heads}
    check_made_of(rngs, **sizes, head_dim=head_dim)
    if num_heads % num_kv_heads:
      raise ValueError(f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}')
    if implementation not in IMPLEMENTATIONS:
      raise ValueError(f"implementation={implementation!r} is not None, 'cudnn' or 'pieces'")
    self.head_dim, self.causal, self.implementation = head_dim, causal, implementation
    options = dict(use_bias=use_bias, dtype=dtype, rngs=rngs)
    self.query = Linear(d_model, num_heads * head_dim, **options)
    self.key = Linear(d_model, num_kv_heads * head_dim, **options)
    self.value = Linear(d_model, num_kv_heads * head_dim, **options)
    self.out = Linear(num_heads * head_dim, d_model, init=out_init, **options)
    self.norm_all = qk_norm_scope == 'all'
    widths = (num_heads * head_dim, num_kv_heads * head_dim) if self.norm_all else (head_dim,) * 2
    norms = [RMSNorm(width, dtype=dtype, rngs=rngs) if qk_norm else None for width in widths]
    self.query_norm, self.key_norm = norms
    self.bias = RelativeBias(num_heads, causal=causal, dtype=dtype, rngs=rngs) if relative else None

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    rotation: tuple[jax.Array, jax.Array] | None = None,
    visible: Visible | None = None,
  ) -> Float[Array, 'B S D']:
    """Output `[B, S, D]`. `rotation` is of rotary.rotation (None: no positions), `visible` of visibility."""
    q, k, v = self.query(x), self.key(x), self.value(x)
    if self.norm_all and self.query_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    q, k, v = self._heads(q), self._heads(k), self._heads(v)
    if not self.norm_all and self.query_norm is not None:
      q, k = self.query_norm(q), self.key_norm(k)
    if rotation is not None:
      q, k = rotate(q, *rotation), rotate(k, *rotation)
    bias = None if self.bias is None else self.bias(x.shape[1])
    y = attend(q, k, v, visible, causal=self.causal, bias=bias, implementation=self.implementation)
    return self.out(y.reshape(*x.shape[:2], -1))  # [B, S, N, H] -> [B, S, N * H]

  def _heads(self, x):
    return x.reshape(*x.shape[:2], -1, self.head_dim)  # [B, S, N * H] -> [B, S, N, H]
