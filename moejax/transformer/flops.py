"""Counts of floating point operations and of parameters, by part of the model.

Model FLOPs: two per multiply-add of a matrix product, nothing for elementwise work; attention counts the
whole square of queries and keys also where half of it is masked (Chowdhery et al. 2022, PaLM, appendix B).
A training step costs three times the forward pass, without recomputation.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from moejax.transformer.latent_attention import Latent

Flops = dict[str, int | float]


def forward_flops_per_token(
  *,
  vocab_size: int,
  d_model: int,
  num_layers: int,
  num_heads: int,
  d_ff: int,
  seq_len: int,
  num_kv_heads: int | None = None,
  head_dim: int | None = None,
  gated: bool = True,
  latent: Latent | None = None,
  heads: Flops | None = None,
  num_moe_layers: int = 0,
  moe: Flops | None = None,
) -> Flops:
  """FLOPs of one token's forward pass through Decoder or Encoder, by part; their sum is the total.

  Args:
    latent: sizes of latent attention; num_kv_heads is then without meaning.
    heads: FLOPs of one token in the attention of one layer, by part, in place of either.
    moe: FLOPs of one token in one mixture, by part, as of `moe_flops_per_token`.
  """
  head_dim = head_dim or d_model // num_heads
  num_kv_heads = num_kv_heads or num_heads
  weights, score_widths = d_model * head_dim * 2 * (num_heads + num_kv_heads), 2 * head_dim
  if latent:
    weights = latent_weights(d_model, num_heads, head_dim, latent)
    score_widths = head_dim + latent.rotary_dim + (latent.value_dim or head_dim)
  attention: Flops = {
    'attention_projections': 2 * weights,
    'attention_scores': 2 * seq_len * num_heads * score_widths,
  }
  flops = {
    **{part: num_layers * count for part, count in (heads or attention).items()},
    'ffn': (num_layers - num_moe_layers) * (3 if gated else 2) * 2 * d_model * d_ff,
    'head': 2 * d_model * vocab_size,
  }
  return {**flops, **{part: num_moe_layers * count for part, count in (moe or {}).items()}}


def latent_weights(d_model: int, num_heads: int, head_dim: int, latent: Latent) -> int:
  """Elements of the matrices of one LatentAttention."""
  value_dim = latent.value_dim or head_dim
  queries = num_heads * (head_dim + latent.rotary_dim)
  query = latent.q_rank * (d_model + queries) if latent.q_rank else d_model * queries
  keys_and_values = d_model * (latent.kv_rank + latent.rotary_dim)
  keys_and_values += latent.kv_rank * num_heads * (head_dim + value_dim)
  return query + keys_and_values + num_heads * value_dim * d_model


def moe_flops_per_token(
  *,
  d_model: int,
  d_ff: int,
  num_experts: int,
  experts_per_token: int | float,
  num_shared: int = 0,
  gated: bool = True,
) -> Flops:
  """FLOPs of one token in one mixture with a linear router; d_ff is the hidden width of one expert."""
  expert = (3 if gated else 2) * 2 * d_model * d_ff
  return {
    'router': 2 * d_model * num_experts,
    'experts': (experts_per_token + num_shared) * expert,
  }


def forward_flops_per_image(
  *,
  image_shape: tuple[int, int, int],
  patch_size: int,
  num_classes: int,
  d_model: int,
  num_layers: int,
  num_heads: int,
  d_ff: int,
  gated: bool = False,
  num_moe_layers: int = 0,
  moe: Flops | None = None,
) -> Flops:
  """FLOPs of one image's forward pass through ViT, by part."""
  height, width, channels = image_shape
  seq_len = (height // patch_size) * (width // patch_size)
  per_token = forward_flops_per_token(
    vocab_size=0,
    d_model=d_model,
    num_layers=num_layers,
    num_heads=num_heads,
    d_ff=d_ff,
    seq_len=seq_len,
    gated=gated,
    num_moe_layers=num_moe_layers,
    moe=moe,
  )
  flops = {part: seq_len * count for part, count in per_token.items()}
  flops['embed'] = seq_len * 2 * patch_size * patch_size * channels * d_model
  flops['head'] = 2 * d_model * num_classes
  return flops


def count_params(params: Mapping) -> dict[str, int]:
  """Numbers of parameters by part of a pure dict of parameters (`nnx.to_pure_dict`), and their 'total'.

  Parts: 'embed' (tokens or patches, positions), 'attention' (with 'attention/experts' and 'attention/router' of heads
  that are experts), 'ffn', 'norm', 'head' (absent when tied), and of mixtures what their own names are: 'moe/experts',
  'moe/router', ... A token that uses K of E experts is served by 'total' less (1 - K / E) of 'moe/experts'.
  """
  counts: dict[str, int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    part = _part([str(key.key) for key in path])
    counts[part] = counts.get(part, 0) + int(np.prod(leaf.shape))
  return {**counts, 'total': sum(counts.values())}


def _part(names: list[str]) -> str:
  top = {'embed': 'embed', 'positions': 'embed', 'head': 'head', 'norm': 'norm'}
  if names[0] in top:
    return top[names[0]]
  if names[1] == 'shared':  # what a stack keeps for the routers of all layers
    return 'moe/router'
  inside = names[names.index('blocks') + 2 :]  # stack/segments/0/blocks/1/<inside>
  if inside[0] == 'router':  # of which tokens skip the block
    return 'depth/router'
  inside = inside[1:] if inside[0] == 'block' else inside
  if inside[0] == 'moe':
    return _mixture_part(inside[1:])
  if inside[0] == 'attention' and inside[1].startswith('w_'):
    return 'attention/experts'
  if inside[0] == 'attention' and 'router' in inside[1]:
    return 'attention/router'
  return 'norm' if inside[0].endswith('_norm') else inside[0]


def _mixture_part(names: list[str]) -> str:
  """The bank is 'moe/experts' in every kind of mixture, routers are 'moe/router'; the rest has its own names."""
  of_one_neuron, without_choice = names[0] in ('w_up', 'w_down'), names[1:] == ['kernel']
  nested = names[0] == 'ffn'
  if 'experts' in names or of_one_neuron or without_choice or nested:
    return 'moe/experts'
  if 'router' in names or names[0] in ('query', 'keys') or names[-1].startswith('gate_'):
    return 'moe/router'
  return f'moe/{names[0]}' if len(names) < 3 else f'moe/{names[-2]}'
