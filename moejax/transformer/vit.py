"""Vision transformer (Dosovitskiy et al. 2021) with optional mixtures of experts (Riquelme et al. 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.arrays import Context, ModelStats
from moejax.sizes import check_made_of
from moejax.transformer.attention import Attention
from moejax.transformer.block import Block
from moejax.transformer.decoder import MakeMixture, head_width, layer_kinds
from moejax.transformer.ffn import FFN
from moejax.transformer.linear import (
  LayerNorm,
  Linear,
  embed_init,
  master_dtype,
  residual_init,
  zeros_init,
)
from moejax.transformer.stack import Stack


class ViT(nnx.Module):
  """Patches, position table, pre-norm blocks with biases and GELU, LayerNorm, average pooling, zero head.

  Pooled as in Soft MoE and big_vision (no class token). Deviation: matrices are initialised as in Decoder,
  not Xavier uniform.

  Args:
    image_shape: (height, width, channels).
    patch_size: side of a square patch in pixels.
    gated: whether dense feed-forward layers are.
    positions: 'learned' table, or fixed 'sincos' (Chen et al. 2021, MoCo v3).
    head_bias: where the biases of the head begin; -ln(classes) for sigmoid outputs in Soft MoE.
    moe, moe_layers, moe_shared, remat, unroll, attention, dtype: as of Decoder.

  Raises:
    ValueError: for sizes that do not divide, an unknown `positions`, moe_layers without moe or out of range.
  """

  def __init__(
    self,
    image_shape: tuple[int, int, int],
    patch_size: int,
    num_classes: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    *,
    qk_norm: bool = False,
    activation: str = 'gelu',
    gated: bool = False,
    positions: str = 'learned',
    head_bias: float = 0.0,
    moe: MakeMixture | Sequence[MakeMixture] | None = None,
    moe_layers: tuple[int, ...] = (),
    moe_shared: Callable[[nnx.Rngs], nnx.Module] | None = None,
    remat: str = 'none',
    unroll: int = 1,
    attention: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    sizes = dict(num_classes=num_classes, d_model=d_model, num_layers=num_layers)
    check_made_of(rngs, patch_size=patch_size, **sizes, num_heads=num_heads, d_ff=d_ff)
    height, width = grid_shape(image_shape, patch_size)
    if positions not in ('learned', 'sincos'):
      raise ValueError(f"positions={positions!r} is not 'learned' or 'sincos'")
    self.patch_size, self.grid = patch_size, (height, width)
    out_init = residual_init(num_layers)

    def make_block(kind, rngs):
      options = dict(use_bias=True, out_init=out_init, dtype=dtype, rngs=rngs)
      sizes = (d_model, num_heads, num_heads, head_width(d_model, num_heads, None))
      attention_layer = Attention(
        *sizes, causal=False, qk_norm=qk_norm, implementation=attention, **options
      )
      block = dict(attention=attention_layer, norm=LayerNorm, dtype=dtype, rngs=rngs)
      if kind in mixtures:
        return Block(d_model, moe=mixtures[kind](rngs), **block)
      ffn = FFN(d_model, d_ff, activation=activation, gated=gated, **options)
      return Block(d_model, ffn=ffn, **block)

    patch_width = patch_size * patch_size * image_shape[2]
    options = dict(use_bias=True, dtype=dtype, rngs=rngs)
    self.embed = Linear(patch_width, d_model, **options)
    learned = positions == 'learned'
    self.positions = position_table(height * width, d_model, dtype, rngs) if learned else None
    kinds, mixtures = layer_kinds(num_layers, moe, moe_layers)
    self.stack = Stack.create(
      make_block, kinds, remat=remat, unroll=unroll, make_shared=moe_shared, rngs=rngs
    )
    self.norm = LayerNorm(d_model, dtype=dtype, rngs=rngs)
    self.head = Linear(
      d_model,
      num_classes,
      init=zeros_init,
      bias_init=nnx.initializers.constant(head_bias),
      **options,
    )

  def __call__(
    self,
    images: Float[Array, 'B I J Q'],
    *,
    valid: Bool[Array, ' B'] | None = None,
    rng: jax.Array | None = None,
    progress: jax.Array | None = None,
    side: Mapping[str, jax.Array] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, 'B O'], ModelStats]:
    """Logits, float32, and the stats of the mixtures stacked in layer order `[L, ...]`, see `ModelStats`.

    Args:
      valid: False for images that only fill the batch: they are not routed and not counted.
      rng: key for routers' noise; every layer gets its own.
      progress: see `Context`.
      side: other fields of `Context` by name, such as `task`.
    """
    x, stats = self.features(
      images, valid=valid, rng=rng, progress=progress, side=side, train=train
    )
    pooled = jnp.mean(x, axis=1, dtype=master_dtype(x.dtype))  # [B, S, D] -> [B, D]
    return self.head(pooled, wide=True), stats

  def features(
    self,
    images: Float[Array, 'B I J Q'],
    *,
    valid: Bool[Array, ' B'] | None = None,
    rng: jax.Array | None = None,
    progress: jax.Array | None = None,
    side: Mapping[str, jax.Array] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, 'B S D'], ModelStats]:
    """Normed features of every patch, before pooling, and stats; arguments as of a call."""
    x = self.embed(to_patches(images, self.patch_size))
    if self.positions is None:
      table = sincos_table(*self.grid, x.shape[-1])
    else:
      table = self.positions[...]
    x = x + table.astype(x.dtype)[None, :, :]
    counted = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None, :], x.shape[:2])
    mask = None if valid is None else jnp.broadcast_to(valid[:, None], x.shape[:2])
    given: dict[str, Any] = {'mask': mask, 'positions': counted, **(side or {})}
    x, stats = self.stack(x, Context(rng=rng, progress=progress, train=train, **given))
    return self.norm(x), stats


def position_table(length: int, d_model: int, dtype, rngs: nnx.Rngs) -> nnx.Param:
  """A learned vector `[S, D]` for every patch."""
  return nnx.Param(embed_init(rngs.params(), (length, d_model), master_dtype(dtype)))


def grid_shape(image_shape: tuple[int, int, int], patch_size: int) -> tuple[int, int]:
  """Rows and columns of patches."""
  height, width, _ = image_shape
  if height % patch_size or width % patch_size:
    raise ValueError(f'patch_size={patch_size} does not divide image_shape={image_shape}')
  return height // patch_size, width // patch_size


def to_patches(images: Float[Array, 'B I J Q'], patch_size: int) -> Float[Array, 'B S patch_width']:
  """Patches row by row, each flattened row by row: with a matrix after it, a convolution of that stride."""
  b, i, j, q = images.shape
  p = patch_size
  x = images.reshape(b, i // p, p, j // p, p, q)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, (i // p) * (j // p), p * p * q)


def sincos_table(height: int, width: int, d_model: int) -> Float[Array, 'S D']:
  """Sines and cosines of column and row at d_model / 4 frequencies from 1 to 1e-4 (MoCo v3).

  Raises:
    ValueError: if 4 does not divide d_model.
  """
  if d_model % 4:
    raise ValueError(f"positions='sincos' needs d_model={d_model} to be a multiple of 4")
  count = d_model // 4
  frequency = 10000.0 ** (-jnp.arange(count, dtype=jnp.float32) / max(count - 1, 1))
  row, column = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')
  angles = [part.astype(jnp.float32).reshape(-1, 1) * frequency[None, :] for part in (column, row)]
  return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)
