"""Images: scaling, and the two-pixel shift against a shift by slices."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data.crop import resize
from experiments.data.images import MAX_SHIFT, shift, to_float
from experiments.errors import BadInput


def _numbered():
  return {
    'image': np.arange(1, 1 + 6 * 7 * 2, dtype=np.uint8).reshape(6, 7, 2),
    'label': np.int32(3),
  }


def _moved(image, down, right):
  """`image` moved, by explicit loops."""
  out = np.zeros_like(image)
  for row in range(image.shape[0]):
    for column in range(image.shape[1]):
      source = row - down, column - right
      if 0 <= source[0] < image.shape[0] and 0 <= source[1] < image.shape[1]:
        out[row, column] = image[source]
  return out


def test_a_shift_moves_the_image_by_at_most_two_pixels_and_all_moves_occur():
  example = _numbered()
  moves = {
    _moved(example['image'], down, right).tobytes(): (down, right)
    for down in range(-MAX_SHIFT, MAX_SHIFT + 1)
    for right in range(-MAX_SHIFT, MAX_SHIFT + 1)
  }
  rng = np.random.default_rng(0)
  shifted = [shift(example, rng) for _ in range(400)]
  seen = [moves[item['image'].tobytes()] for item in shifted]  # KeyError: not a move
  assert len(set(seen)) == 25
  assert all(item['label'] == 3 for item in shifted)
  np.testing.assert_array_equal(example['image'], _numbered()['image'])


def test_signed_maps_the_pixels_to_minus_one_to_one():
  image = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1)
  out = to_float({'image': image}, 'signed')['image']
  assert out.dtype == np.float32
  np.testing.assert_allclose(out.ravel(), [-1, -0.6, 1], atol=1e-6)


def test_standard_gives_mean_zero_and_deviation_one_and_zero_for_a_uniform_image():
  image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
  out = to_float({'image': image}, 'standard')['image']
  assert out.dtype == np.float32
  assert abs(out.mean()) < 1e-5
  assert out.std() == pytest.approx(1, abs=1e-5)
  assert not to_float({'image': np.full((8, 8, 1), 9, np.uint8)}, 'standard')['image'].any()


def test_training_images_are_shifts_of_the_originals_anew_each_epoch(image_stream):
  originals = image_stream(train=False, split='train[:16]', batch_size=16).batch(0)
  stream = image_stream(split='train[:16]', batch_size=16)
  epochs = [stream.batch(epoch) for epoch in range(2)]
  np.testing.assert_equal(stream.batch(0), epochs[0])
  moved = [
    {
      _moved((image + 1) / 2, down, right).astype(np.float16).tobytes()
      for down in range(-2, 3)
      for right in range(-2, 3)
    }
    for image in originals['image']
  ]
  for batch in epochs:
    assert sorted(batch['label']) == sorted(originals['label'])
    owners = [
      next(i for i, all_moves in enumerate(moved) if key in all_moves)
      for key in (((image + 1) / 2).astype(np.float16).tobytes() for image in batch['image'])
    ]
    assert sorted(owners) == list(range(16))
  assert epochs[0]['image'].tobytes() != epochs[1]['image'].tobytes()


def test_evaluation_images_are_the_originals(image_stream, data_dir):
  batch = image_stream(split='test', train=False).batch(3)
  records = tfds.builder_from_directory(data_dir / 'mnist5k' / '1.0.0').as_data_source('test')
  expected = np.stack([records[i]['image'] for i in range(24, 32)])
  np.testing.assert_array_equal(np.round((batch['image'] + 1) * 127.5), expected)
  assert batch['label'].tolist() == [records[i]['label'] for i in range(24, 32)]


def test_resizing_keeps_the_central_square():
  image = np.zeros((4, 8, 1), np.uint8)
  image[:, 2:6] = 200  # the central square
  assert resize(image, 2).tolist() == [[[200], [200]], [[200], [200]]]
  square = np.arange(16, dtype=np.uint8).reshape(4, 4, 1)
  np.testing.assert_array_equal(resize(square, 4), square)


def test_text_is_refused_for_classification(text_stream):
  with pytest.raises(BadInput, match=r"features index, text.*needs 'image' and 'label'"):
    text_stream(objective='classify', sequence_length=None)


def test_an_unknown_normalization_is_refused(image_stream):
  with pytest.raises(BadInput, match="normalization='imagenet' is not one of signed, standard"):
    image_stream(normalization='imagenet')
