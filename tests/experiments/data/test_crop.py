"""Crops: areas and aspects within their bounds, places, flips, and streams that give the same ones again."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import make_stream
from experiments.data.builders import OrderedBuilder, prepare
from experiments.data.crop import crop_box, inception_crop, resize, scaled
from experiments.errors import BadInput


def boxes(height, width, number=2000):
  rng = np.random.default_rng(0)
  return np.array([crop_box(height, width, rng) for _ in range(number)])


def test_crops_have_every_area_and_aspect_that_is_accepted_and_no_other():
  top, left, height, width = boxes(400, 400).T
  assert (top >= 0).all()
  assert (left >= 0).all()
  assert (top + height <= 400).all()
  assert (left + width <= 400).all()
  areas, aspects = height * width / 160_000, width / height
  # a side is rounded to whole pixels: half of one of about 80
  assert 0.05 * 0.98 < areas.min() < 0.06
  assert 0.95 < areas.max() <= 1  # where few aspects fit
  assert 0.74 < aspects.min() < 0.76
  assert 1.32 < aspects.max() < 1.35
  # areas are even where every aspect fits: below 3/4 of a square
  inside = areas[areas < 0.74]
  counts, _ = np.histogram(inside, bins=5, range=(0.05, 0.74))
  assert counts.min() > 0.85 * len(inside) / 5
  assert abs(np.log(aspects).mean()) < 0.02
  # and a small crop may lie anywhere
  small = areas < 0.2
  assert abs((top + height / 2)[small].mean() / 400 - 0.5) < 0.03


def test_of_a_strip_that_no_crop_fits_the_middle_is_taken():
  assert {tuple(box) for box in boxes(2, 300, 20)} == {(0, 149, 2, 2)}
  assert {tuple(box) for box in boxes(900, 3, 20)} == {(448, 0, 4, 3)}


def test_half_of_the_images_are_mirrored_and_labels_stay():
  """Columns grow from left to right in the image, so in a crop, and fall in a mirrored one."""
  image = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 1))
  rng = np.random.default_rng(0)
  made = [inception_crop({'image': image, 'label': 7}, rng, (16, 24)) for _ in range(200)]
  assert {one['image'].shape for one in made} == {(16, 24, 1)}
  assert {one['label'] for one in made} == {7}
  rising = [one['image'][0, -1, 0] > one['image'][0, 0, 0] for one in made]
  assert 80 < sum(rising) < 120
  for one, up in zip(made, rising, strict=True):
    steps = np.diff(one['image'][..., 0].astype(int), axis=1)
    assert (steps >= 0).all() if up else (steps <= 0).all()


def test_what_is_scaled_is_the_inside_of_the_box():
  image = np.zeros((8, 10, 2), np.uint8)
  image[2:6, 3:7, 0], image[2:6, 3:7, 1] = 100, 200
  found = scaled(image, (2, 3, 4, 4), (2, 3))
  assert found.shape == (2, 3, 2)
  assert (found[..., 0] == 100).all()
  assert (found[..., 1] == 200).all()


def test_evaluation_sees_a_part_of_the_central_square():
  image = np.zeros((16, 20, 1), np.uint8)
  image[1:15, 3:17] = 50  # the central square of 14 of 16 pixels
  assert (resize(image, 14, 0.875) == 50).all()
  assert resize(image, 16)[0, 0, 0] == 0


class Photos(OrderedBuilder, skip_registration=True):
  """24 coloured images of unlike sizes, with one to three labels."""

  VERSION = tfds.core.Version('1.0.0')
  SOURCE_SHA256 = 'c' * 64
  DESCRIPTION = 'images of a test'
  METADATA = {'num_classes': 5}  # noqa: RUF012

  def features(self):
    free = tfds.features.Tensor(shape=(None, None, 3), dtype=np.uint8, encoding='bytes')
    return {'image': free, 'labels': tfds.features.Sequence(tfds.features.Scalar(np.int64))}

  def splits(self):
    rng = np.random.default_rng(0)
    made = []
    for i in range(24):
      image = rng.integers(0, 256, (10 + i, 40 - i, 3)).astype(np.uint8)
      made.append({'image': image, 'labels': [i % 5, (i + 1) % 5, (i + 2) % 5][: 1 + i % 3]})
    return {'train': made}


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp('photos')
  prepare(Photos, folder)

  def stream(**options):
    given = {
      'split': 'train',
      'objective': 'classify',
      'batch_size': 8,
      'seed': 3,
      'image_size': 12,
    }
    return make_stream('photos', **given | options, data_dir=folder)

  return stream


def test_crops_are_a_function_of_seed_and_step_alone(photos):
  """A second stream, as a resumed run opens one, begins with step 4; two processes read halves of the same batch."""
  whole = photos(augment='inception')
  batches = [whole.batch(step) for step in range(6)]
  again = photos(augment='inception')
  np.testing.assert_equal(again.batch(4), batches[4])
  parts = [photos(augment='inception', process_index=i, process_count=2).batch(4) for i in range(2)]
  np.testing.assert_array_equal(
    np.concatenate([part['image'] for part in parts]), batches[4]['image']
  )
  other = photos(augment='inception', seed=4).batch(4)
  assert np.abs(other['image'] - batches[4]['image']).max() > 0.1
  assert batches[0]['image'].shape == (8, 12, 12, 3)
  # one pass is three batches: the next one has other crops of the same images
  passes = [
    {key: np.concatenate([batch[key] for batch in part]) for key in batches[0]}
    for part in (batches[:3], batches[3:])
  ]
  labels = [sorted(map(tuple, one['label'])) for one in passes]
  assert labels[0] == labels[1]
  sums = [np.sort(one['image'].sum((1, 2, 3))) for one in passes]
  assert np.abs(sums[0] - sums[1]).max() > 1


def test_several_labels_are_filled_up_with_minus_one(photos):
  batch = photos(train=False).batch(0)
  assert batch['label'].tolist()[:4] == [[0, -1, -1], [1, 2, -1], [2, 3, 4], [3, -1, -1]]
  assert photos().num_labels == 3


def test_a_fixed_size_is_kept_without_a_size_given(image_stream):
  stream = image_stream(augment='inception')
  assert stream.batch(0)['image'].shape == (8, 28, 28, 1)
  assert stream.num_labels is None
  plain = image_stream(augment='none', split='train[:16]').batch(0)
  originals = image_stream(train=False, split='train[:16]', batch_size=16).batch(0)
  originals = {image.tobytes() for image in originals['image']}
  assert all(image.tobytes() in originals for image in plain['image'])


def test_settings_that_change_the_images_change_the_fingerprint(image_stream):
  usual = image_stream().fingerprint
  assert 'augment' not in usual
  assert image_stream(augment='inception').fingerprint == usual | {'augment': 'inception'}
  part = image_stream(train=False, eval_crop=0.875)
  assert part.fingerprint['eval_crop'] == 0.875
  assert part.batch(0)['image'].shape == (8, 28, 28, 1)


def test_an_unknown_augmentation_is_refused(image_stream):
  with pytest.raises(BadInput, match="augment='mixup' is not one of shift, inception, none"):
    image_stream(augment='mixup')
