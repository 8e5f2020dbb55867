"""Transformer over token sequences: `Decoder` (causal language model) and `Encoder` (masked language model)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moejax.arrays import Context, ModelStats
from moejax.sizes import check_made_of
from moejax.transformer.attention import Attention, Visible, visibility
from moejax.transformer.block import Block
from moejax.transformer.depth import Depth, SkippedBlock
from moejax.transformer.ffn import FFN
from moejax.transformer.latent_attention import Latent, LatentAttention
from moejax.transformer.linear import Embed, Linear, RMSNorm, residual_init
from moejax.transformer.rotary import rotation
from moejax.transformer.stack import Stack

MakeMixture = Callable[[nnx.Rngs], nnx.Module]
SKIPPED = ', skipped'
"""End of the kind of a layer that tokens may skip."""


class Decoder(nnx.Module):
  """Pre-norm transformer with RMSNorm, rotary positions and (gated) feed-forward layers, some of them mixtures.

  Args:
    d_ff: hidden width of the dense feed-forward layers.
    num_kv_heads: key and value heads; None for num_heads.
    head_dim: None for d_model / num_heads.
    qk_norm: RMSNorm over each query and key head, or with qk_norm_scope='all' over all of them at once.
    latent: sizes of latent attention, in place of grouped queries; None for these.
    heads: makes the attention of one block, in place of either, such as moejax/moe/attention_experts.py.
    positions: 'rotary', or 'relative': biases by distance in every layer (T5). A distance is that of two places of a
      row, whatever `positions` of a call says; inside a packed document the two agree.
    rope_theta: base of the rotary frequencies.
    tie_embeddings: the output layer is the transposed embedding table.
    moe: makes one mixture, `y, aux = layer(x, context)`; the layers named in `moe_layers` hold one each. Or several
      such functions, one for each of these layers from the first on: runs of layers of one function are one loop
      (pyramids, PR-MoE, Rajbhandari et al. 2022, whose later layers have more experts).
    depth: which blocks tokens may skip (Mixture of Depths); None for none.
    moe_shared: makes what their routers share, see `Stack`; None for nothing.
    causal: False lets every position attend to every other (Encoder).
    remat: what the backward pass computes again, a key of stack.REMAT.
    unroll: layers of the loop that are compiled one after the other; more is faster on a CPU, to compile slower.
    attention: how it is computed: None, 'cudnn' for flash attention on an NVIDIA GPU in a 16-bit dtype, or 'pieces' of
      causal queries, which is faster on CPUs (attention.py).
    dtype: of computations and of the residual stream; parameters and logits are float32 (or wider).

  Initialisation: matrices truncated normal with variance 1 / fan_in, those that write into the residual
  stream 1 / sqrt(2 * num_layers) of it, embeddings normal(0.02) (Radford et al. 2019, section 2.3).

  Raises:
    ValueError: for sizes that do not divide, an unknown `positions`, options that latent attention does not have, and
      for moe_layers without moe or out of range.
  """

  def __init__(
    self,
    vocab_size: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    qk_norm: bool = False,
    qk_norm_scope: Literal['head', 'all'] = 'head',
    latent: Latent | None = None,
    heads: Callable[[nnx.Rngs], nnx.Module] | None = None,
    positions: str = 'rotary',
    rope_theta: float = 10000.0,
    tie_embeddings: bool = True,
    activation: str = 'silu',
    gated: bool = True,
    moe: MakeMixture | Sequence[MakeMixture] | None = None,
    moe_layers: tuple[int, ...] = (),
    moe_shared: Callable[[nnx.Rngs], nnx.Module] | None = None,
    depth: Depth | None = None,
    causal: bool = True,
    remat: str = 'none',
    unroll: int = 1,
    attention: str | None = None,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
  ):
    sizes = dict(vocab_size=vocab_size, d_model=d_model, num_layers=num_layers)
    check_made_of(rngs, **sizes, num_heads=num_heads, d_ff=d_ff)
    head_dim = head_width(d_model, num_heads, head_dim)
    check_attention(num_heads, num_kv_heads, qk_norm, latent, heads, positions, attention)
    self.causal, self.rotates = causal, positions == 'rotary'
    self.rotary_dim, self.rope_theta = latent.rotary_dim if latent else head_dim, rope_theta
    kinds, mixtures = layer_kinds(num_layers, moe, moe_layers)
    for layer in check_layers(depth.layers if depth else (), num_layers):
      kinds[layer] += SKIPPED
    writes = dict(out_init=residual_init(num_layers), dtype=dtype)

    def make_attention(rngs):
      if heads:
        return heads(rngs)
      options = dict(causal=causal, rngs=rngs, **writes)
      if latent:
        return LatentAttention(d_model, num_heads, head_dim, latent, **options)
      return Attention(
        d_model,
        num_heads,
        num_kv_heads or num_heads,
        head_dim,
        qk_norm=qk_norm,
        qk_norm_scope=qk_norm_scope,
        relative=positions == 'relative',
        implementation=attention,
        **options,
      )

    def make_whole(kind, rngs):
      block = dict(attention=make_attention(rngs), dtype=dtype, rngs=rngs)
      if kind in mixtures:
        return Block(d_model, moe=mixtures[kind](rngs), **block)
      ffn = FFN(d_model, d_ff, activation=activation, gated=gated, rngs=rngs, **writes)
      return Block(d_model, ffn=ffn, **block)

    def make_block(kind, rngs):
      block = make_whole(kind.removesuffix(SKIPPED), rngs)
      if not kind.endswith(SKIPPED):
        return block
      return SkippedBlock(d_model, block, depth, causal=causal, rngs=rngs)

    self.embed = Embed(vocab_size, d_model, dtype=dtype, rngs=rngs)
    self.stack = Stack.create(
      make_block, kinds, remat=remat, unroll=unroll, make_shared=moe_shared, rngs=rngs
    )
    self.norm = RMSNorm(d_model, dtype=dtype, rngs=rngs)
    self.head = None if tie_embeddings else Linear(d_model, vocab_size, dtype=dtype, rngs=rngs)

  def __call__(
    self,
    tokens: Int[Array, 'B S'],
    *,
    positions: Int[Array, 'B S'] | None = None,
    segment_ids: Int[Array, 'B S'] | None = None,
    mask: Bool[Array, 'B S'] | None = None,
    rng: jax.Array | None = None,
    progress: jax.Array | None = None,
    side: Mapping[str, jax.Array] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, 'B S V'], ModelStats]:
    """Logits, float32, and the stats of the mixtures stacked in layer order `[L, ...]`, see `ModelStats`.

    Args:
      positions: for rotation and routers; None counts from 0 in every row. Rotation only sees differences, so
        packed documents need none of their own.
      segment_ids: tokens attend only within their segment.
      mask: True for real tokens. Padding is not attended to, not routed and not counted.
      rng: key for routers' noise; every layer gets its own.
      progress: see `Context`.
      side: other fields of `Context` by name, such as `task`.
    """
    x, stats = self.features(
      tokens,
      positions=positions,
      segment_ids=segment_ids,
      mask=mask,
      rng=rng,
      progress=progress,
      side=side,
      train=train,
    )
    return self.logits(x), stats

  def features(
    self, tokens: Int[Array, 'B S'], **inputs
  ) -> tuple[Float[Array, 'B S D'], ModelStats]:
    """What the output layer reads, and stats; arguments as of a call."""
    x, stats = self.stack(*self.enter(tokens, **inputs))
    return self.norm(x), stats

  def enter(
    self,
    tokens: Int[Array, 'B S'],
    *,
    positions: Int[Array, 'B S'] | None = None,
    segment_ids: Int[Array, 'B S'] | None = None,
    mask: Bool[Array, 'B S'] | None = None,
    rng: jax.Array | None = None,
    progress: jax.Array | None = None,
    side: Mapping[str, jax.Array] | None = None,
    train: bool = False,
  ) -> tuple[Float[Array, 'B S D'], Context, tuple[jax.Array, jax.Array] | None, Visible | None]:
    """What the first block is called with; arguments as of a call."""
    counted = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]  # [1, S] serves every sequence
    places = counted if positions is None else positions
    turn = rotation(places, self.rotary_dim, theta=self.rope_theta) if self.rotates else None
    fields: dict[str, Any] = dict(side or {})
    context = Context(
      mask=mask,
      token_ids=tokens,
      positions=jnp.broadcast_to(counted, tokens.shape) if positions is None else positions,
      rng=rng,
      progress=progress,
      train=train,
      **fields,
    )
    visible = visibility(segment_ids, mask, causal=self.causal)
    return self.embed(tokens), context, turn, visible

  def logits(self, x: Float[Array, '... D']) -> Float[Array, '... V']:
    """The output layer, float32 or wider."""
    return self.embed.attend(x) if self.head is None else self.head(x, wide=True)


class Encoder(Decoder):
  """The same with every position visible to every other, for masked language models."""

  def __init__(self, *sizes, **options):
    super().__init__(*sizes, causal=False, **options)


def check_attention(
  num_heads: int,
  num_kv_heads: int | None,
  qk_norm: bool,
  latent: Latent | None,
  heads: Callable[[nnx.Rngs], nnx.Module] | None,
  positions: str,
  attention: str | None,
) -> None:
  """Raises ValueError for options of Decoder that its kind of attention does not have."""
  if heads and (latent or qk_norm or attention):
    raise ValueError(
      f'heads with latent={latent}, qk_norm={qk_norm}, attention={attention!r}: accepted are None, False and None'
    )
  if latent and (num_kv_heads not in (None, num_heads) or qk_norm or attention):
    raise ValueError(
      f'latent attention with num_kv_heads={num_kv_heads}, qk_norm={qk_norm}, attention={attention!r}: '
      'accepted are None, False and None'
    )
  accepted = ('rotary',) if latent or heads else ('rotary', 'relative')
  if positions not in accepted:
    raise ValueError(f'positions={positions!r} is not {" or ".join(map(repr, accepted))}')


def head_width(d_model: int, num_heads: int, head_dim: int | None) -> int:
  """head_dim, or d_model / num_heads where None."""
  if head_dim is None and d_model % num_heads:
    raise ValueError(f'num_heads={num_heads} does not divide d_model={d_model}; else give head_dim')
  return head_dim or d_model // num_heads


def layer_kinds(
  num_layers: int,
  moe: MakeMixture | Sequence[MakeMixture] | None,
  moe_layers: tuple[int, ...],
) -> tuple[list[str], dict[str, MakeMixture]]:
  """The kind of every layer, 'dense' of those that are not in `moe_layers`, and what makes the mixture of a kind."""
  if moe_layers and moe is None:
    raise ValueError(f'moe_layers={moe_layers} but moe=None: give a function that makes the layer')
  chosen = check_layers(tuple(moe_layers), num_layers)
  makers = [moe] * len(chosen) if moe is None or callable(moe) else list(moe)
  if len(makers) != len(chosen):
    raise ValueError(
      f'{len(makers)} functions moe for moe_layers={moe_layers}: one, or one for each'
    )
  names = {make: f'moe {index}' for index, make in enumerate(dict.fromkeys(makers))}
  of_layer = dict(zip(chosen, makers, strict=True))
  kinds = [names[of_layer[i]] if i in of_layer else 'dense' for i in range(num_layers)]
  return kinds, {name: make for make, name in names.items()}


def check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
  """`layers` in order; ValueError if one is out of range or named twice."""
  for layer in layers:
    if not 0 <= layer < num_layers:
      raise ValueError(
        f'moe_layers={layers} names layer {layer} of num_layers={num_layers}; layers are 0 to {num_layers - 1}'
      )
  if len(set(layers)) != len(layers):
    raise ValueError(f'moe_layers={layers} names a layer twice; each may stand there once')
  return tuple(sorted(layers))
