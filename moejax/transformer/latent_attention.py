"""Multi-head latent attention: queries, keys and values out of narrow latents (DeepSeek-V2, 2024; DeepSeek-V3).

For a token's vector h, section 2.1 and appendix C of DeepSeek-V2 (equations 37 to 47):

  c_q = norm(W_DQ h)                     [q_rank]        query latent; without one (q_rank = 0) c_q = h
  [q_i, r_i] = W_UQ c_q                  [N, H + H_r]    a head's content and position part
  [c_kv, r] = W_DKV h                    [kv_rank + H_r] what a decoder caches; r is one for all heads
  [k_i, v_i] = W_UKV norm(c_kv)          [N, H + H_v]
  score_i(s, t) = ([q_i, R r_i](s) . [k_i, R r](t)) / sqrt(H + H_r)
  u = W_O [softmax(score_1) v_1; ...; softmax(score_N) v_N]

R is the rotation by position; only the H_r dimensions are turned, so that W_UK could be absorbed into W_UQ in decoding.
The norms are RMSNorm. Pairs are turned as in rotary.py (halves; DeepSeek interleaves them: a permutation of
columns of W_UQ and W_DKV). The scale has no factor for stretched contexts (YaRN).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.sizes import check_made_of
from moejax.transformer.attention import Visible, attend
from moejax.transformer.linear import Init, Linear, RMSNorm, fan_in_init
from moejax.transformer.rotary import rotate


@dataclasses.dataclass(frozen=True)
class Latent:
  """Sizes of latent attention.

  Attributes:
    q_rank: width of the query latent; 0 for none.
    kv_rank: width of the latent of keys and values.
    rotary_dim: H_r, even.
    value_dim: H_v; 0 for the width of a head.

  Raises:
    ValueError: a size out of its range.
  """

  q_rank: int
  kv_rank: int
  rotary_dim: int
  value_dim: int = 0

  def __post_init__(self):
    if self.q_rank < 0 or self.value_dim < 0:
      raise ValueError(
        f'latent q_rank={self.q_rank}, value_dim={self.value_dim}: accepted are integers from 0'
      )
    if self.kv_rank < 1:
      raise ValueError(f'latent kv_rank={self.kv_rank}: accepted are integers from 1')
    if self.rotary_dim < 2 or self.rotary_dim % 2:
      raise ValueError(
        f'latent rotary_dim={self.rotary_dim}: accepted are even integers from 2, rotary positions turn pairs'
      )


class LatentAttention(nnx.Module):
  """Self-attention whose keys and values come out of one latent of `latent.kv_rank` a token.

  Args:
    d_model: D.
    num_heads: N; keys and values have as many.
    head_dim: H, of the part of a head without positions.
    latent: the other sizes.
    causal, out_init, dtype: as of Attention.
  """

  def __init__(
    self,
    d_model: int,
    num_heads: int,
    head_dim: int,
    latent: Latent,
    *,
    causal: bool,
    out_init: Init = fan_in_init,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, num_heads=num_heads, head_dim=head_dim)
    self.head_dim, self.rotary_dim, self.kv_rank = head_dim, latent.rotary_dim, latent.kv_rank
    self.causal = causal
    value_dim = latent.value_dim or head_dim
    options = dict(dtype=dtype, rngs=rngs)
    narrow = latent.q_rank > 0
    self.query_down = Linear(d_model, latent.q_rank, **options) if narrow else None
    self.query_norm = RMSNorm(latent.q_rank, **options) if narrow else None
    queries = num_heads * (head_dim + latent.rotary_dim)
    self.query_up = Linear(latent.q_rank if narrow else d_model, queries, **options)
    self.kv_down = Linear(d_model, latent.kv_rank + latent.rotary_dim, **options)
    self.kv_norm = RMSNorm(latent.kv_rank, **options)
    self.kv_up = Linear(latent.kv_rank, num_heads * (head_dim + value_dim), **options)
    self.out = Linear(num_heads * value_dim, d_model, init=out_init, **options)

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    rotation: tuple[jax.Array, jax.Array] | None = None,
    visible: Visible | None = None,
  ) -> Float[Array, 'B S D']:
    """Output `[B, S, D]`. `rotation` is of rotary.rotation with width rotary_dim, `visible` of visibility."""
    b, s, _ = x.shape
    q = x if self.query_down is None else self.query_norm(self.query_down(x))
    q = self.query_up(q).reshape(b, s, -1, self.head_dim + self.rotary_dim)
    q, q_turned = jnp.split(q, (self.head_dim,), axis=-1)
    latent, k_turned = jnp.split(self.kv_down(x), (self.kv_rank,), axis=-1)
    kv = self.kv_up(self.kv_norm(latent)).reshape(b, s, q.shape[2], -1)
    k, v = jnp.split(kv, (self.head_dim,), axis=-1)
    k_turned = k_turned[:, :, None, :]  # [B, S, 1, H_r]
    if rotation is not None:
      q_turned, k_turned = rotate(q_turned, *rotation), rotate(k_turned, *rotation)
    k_turned = jnp.broadcast_to(k_turned, q_turned.shape)  # one for all heads
    q, k = jnp.concatenate([q, q_turned], -1), jnp.concatenate([k, k_turned], -1)
    y = attend(q, k, v, visible, causal=self.causal)  # [B, S, N, H_v]
    return self.out(y.reshape(b, s, -1))
