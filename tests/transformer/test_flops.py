import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax.transformer import (
  Decoder,
  Encoder,
  ViT,
  count_params,
  forward_flops_per_image,
  forward_flops_per_token,
  moe_flops_per_token,
)


def test_a_small_decoder_counted_by_hand():
  flops = forward_flops_per_token(
    vocab_size=10,
    d_model=8,
    num_layers=3,
    num_heads=4,
    d_ff=16,
    seq_len=5,
    num_kv_heads=2,
    num_moe_layers=1,
    moe=moe_flops_per_token(d_model=8, d_ff=4, num_experts=6, experts_per_token=2, num_shared=1),
  )
  assert flops == {
    'attention_projections': 3 * 2 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8),
    'attention_scores': 3 * (2 * 5 * 8 + 2 * 5 * 8),
    'ffn': 2 * 3 * 2 * 8 * 16,
    'head': 2 * 8 * 10,
    'router': 2 * 8 * 6,
    'experts': (2 + 1) * 3 * 2 * 8 * 4,
  }


def compiled_flops(model, inputs):
  """XLA's count for one layer: it counts the body of a loop once, however often it runs."""
  graph, state = nnx.split(model)
  compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0]).lower(state, inputs).compile()
  return compiled.cost_analysis()['flops']


def test_an_encoder_agrees_with_the_compiler_within_5_percent():
  sizes = dict(vocab_size=512, d_model=256, num_layers=1, num_heads=2, d_ff=1024)
  model = Encoder(*sizes.values(), rngs=nnx.Rngs(0))
  counted = compiled_flops(model, jnp.zeros((2, 64), jnp.int32))
  expected = 128 * sum(forward_flops_per_token(**sizes, seq_len=64).values())
  assert counted == pytest.approx(expected, rel=0.05)


def test_a_vit_agrees_with_the_compiler_within_5_percent():
  sizes = dict(
    image_shape=(32, 32, 3),
    patch_size=4,
    num_classes=10,
    d_model=256,
    num_layers=1,
    num_heads=2,
    d_ff=1024,
  )
  counted = compiled_flops(ViT(*sizes.values(), rngs=nnx.Rngs(0)), jnp.zeros((2, 32, 32, 3)))
  expected = 2 * sum(forward_flops_per_image(**sizes).values())
  assert counted == pytest.approx(expected, rel=0.05)


def test_parameters_are_counted_by_part(toy_moe):
  model = Decoder(
    10, 8, 3, 2, 16, moe=toy_moe(8), moe_layers=(1,), tie_embeddings=False, rngs=nnx.Rngs(0)
  )
  counts = count_params(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  assert counts == {
    'embed': 80,
    'attention': 3 * 4 * 64,
    'ffn': 2 * 3 * 128,
    'moe/router': 8 * 3,
    'moe/experts': 3 * 64,
    'norm': 3 * 2 * 8 + 8,
    'head': 80,
    'total': 80 + 768 + 768 + 216 + 56 + 80,
  }


def test_a_vit_counts_its_position_table_as_embedding():
  counts = count_params(
    nnx.to_pure_dict(nnx.state(ViT((4, 4, 1), 2, 3, 8, 1, 2, 8, rngs=nnx.Rngs(0))))
  )
  assert counts['embed'] == 4 * 8 + 8 + 4 * 8
  assert counts['head'] == 8 * 3 + 3
