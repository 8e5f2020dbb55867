import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.transformer import ViT
from moejax.transformer.vit import sincos_table, to_patches

SIZES = ((8, 12, 3), 4, 5, 16, 2, 2, 24)


def make_vit(seed=0, **options):
  """A ViT whose head is no longer zero, so that logits say something."""
  model = ViT(*SIZES, **options, rngs=nnx.Rngs(seed))
  model.head.weight[...] = jax.random.normal(jax.random.key(9), (16, 5))
  return model


@pytest.fixture
def images(rng):
  return jnp.asarray(rng.normal(size=(3, 8, 12, 3)).astype(np.float32))


def test_patches_are_squares_of_the_image_in_reading_order(images):
  patches = to_patches(images, 4)
  assert patches.shape == (3, 6, 48)
  np.testing.assert_array_equal(patches[1, 4], images[1, 4:8, 4:8].reshape(-1))


def test_embedding_patches_is_a_convolution(images):
  model = make_vit()
  kernel = model.embed.weight[...].reshape(4, 4, 3, 16)
  layout = ('NHWC', 'HWIO', 'NHWC')
  expected = jax.lax.conv_general_dilated(images, kernel, (4, 4), 'VALID', dimension_numbers=layout)
  np.testing.assert_allclose(
    model.embed(to_patches(images, 4)), expected.reshape(3, 6, 16), atol=1e-5
  )


def test_a_fresh_model_gives_every_class_the_same_logit(images):
  logits, stats = ViT(*SIZES, rngs=nnx.Rngs(0))(images)
  np.testing.assert_array_equal(logits, np.zeros((3, 5)))
  assert logits.dtype == jnp.float32
  assert stats is None


def test_permuting_the_columns_of_the_head_permutes_the_classes(images):
  model = make_vit()
  before = model(images)[0]
  order = jnp.array([3, 0, 4, 1, 2])
  model.head.weight[...] = model.head.weight[...][:, order]
  np.testing.assert_allclose(model(images)[0], before[:, order], atol=1e-6)


def swap_first_patches(images):
  left, right = images[:, :4, :4], images[:, :4, 4:8]
  return images.at[:, :4, :4].set(right).at[:, :4, 4:8].set(left)


@pytest.mark.parametrize('positions', ['learned', 'sincos'])
def test_only_positions_tell_patches_apart(positions, images):
  model = make_vit(positions=positions)
  logits = model(images)[0]
  assert np.abs(logits - model(swap_first_patches(images))[0]).max() > 1e-4
  if positions == 'learned':
    model.positions[...] = jnp.zeros_like(model.positions[...])
    np.testing.assert_allclose(model(images)[0], model(swap_first_patches(images))[0], atol=1e-5)


def test_images_do_not_see_each_other(toy_moe, images):
  model = make_vit(moe=toy_moe(16), moe_layers=(1,))
  logits, stats = model(images, train=True)
  np.testing.assert_allclose(model(images[1:2])[0], logits[1:2], atol=1e-5)
  assert stats.tokens.tolist() == [18]


def test_bfloat16_follows_float32(images):
  np.testing.assert_allclose(
    make_vit(dtype=jnp.bfloat16)(images)[0], make_vit()(images)[0], atol=0.1
  )


def test_sincos_positions_are_products_of_their_axes():
  table = np.asarray(sincos_table(2, 3, 8))
  assert table.shape == (6, 8)
  # (row 1, column 2): sine and cosine of 2 and 2e-4, then of 1 and 1e-4
  expected = [f(angle * w) for angle in (2, 1) for f in (np.sin, np.cos) for w in (1, 1e-4)]
  np.testing.assert_allclose(table[5], expected, atol=1e-6)


def test_a_patch_that_does_not_divide_the_image_is_refused():
  with pytest.raises(ValueError, match='patch_size=5 does not divide'):
    ViT((8, 12, 3), 5, 5, 16, 2, 2, 24, rngs=nnx.Rngs(0))


def test_unknown_positions_are_refused():
  with pytest.raises(ValueError, match="positions='rotary'"):
    ViT(*SIZES, positions='rotary', rngs=nnx.Rngs(0))
