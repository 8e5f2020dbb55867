"""Invalid records are skipped and counted, too many or damaged files stop, the index is a cache."""

import io

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import make_stream, records
from experiments.data.builders import OrderedBuilder, prepare
from experiments.data.records import Cache
from experiments.errors import DataError


def _good(count):
  return [(np.full((4, 4, 1), i, np.uint8), i % 3) for i in range(count)]


def _images(data_dir, **options):
  return make_stream(
    'small_images',
    **{'split': 'train', 'objective': 'classify', 'batch_size': 5, 'seed': 0},
    **{'train': False, **options},
    data_dir=data_dir,
  )


@pytest.mark.parametrize(
  'bad',
  [
    (np.zeros((4, 5, 1), np.uint8), 0),
    (np.zeros((0, 4, 1), np.uint8), 0),
    (np.zeros((4, 4, 1), np.uint8), 3),
    (np.zeros((4, 4, 1), np.uint8), -1),
  ],
  ids=['wrong shape', 'empty', 'label too large', 'negative label'],
)
def test_an_invalid_image_is_skipped_and_counted_and_the_others_keep_their_order(bad, make_images):
  good = _good(100)
  stream = _images(make_images([*good[:40], bad, *good[40:]]))
  assert stream.skipped == 1
  assert stream.num_records == 100
  labels = np.concatenate([stream.batch(step)['label'] for step in range(stream.num_batches)])
  assert labels.tolist() == [label for _, label in good]


def test_with_an_invalid_record_a_batch_is_still_a_pure_function_of_the_step(make_images):
  bad = (np.zeros((5, 4, 1), np.uint8), 0)
  good = _good(120)
  data_dir = make_images([*good[:7], bad, *good[7:]])
  streams = [_images(data_dir, train=True) for _ in range(2)]
  epoch = np.concatenate([streams[0].batch(step)['label'] for step in range(24)])
  assert np.bincount(epoch).tolist() == [40, 40, 40]  # every valid record once
  np.testing.assert_equal(streams[1].batch(13), streams[0].batch(13))
  assert [stream.skipped for stream in streams] == [1, 1]


def test_more_than_one_percent_invalid_stops_with_the_first_reason(make_images):
  bad = (np.zeros((4, 5, 1), np.uint8), 0)
  with pytest.raises(
    DataError,
    match=r'2 of the 102 records of small_images/1\.0\.0 train are not valid, and at most 1% '
    r'may be; the first is record 100: image has shape \(4, 5, 1\), expected \(4, 4, 1\)',
  ):
    _images(make_images([*_good(100), bad, bad]))


@pytest.mark.parametrize('content', [b'no image', None], ids=['garbage', 'truncated'])
def test_an_image_that_cannot_be_decoded_is_skipped(content, tmp_path):
  pillow = pytest.importorskip('PIL.Image')

  def png():
    file = io.BytesIO()
    pillow.fromarray(np.arange(4800, dtype=np.uint8).reshape(40, 40, 3)).save(file, 'png')
    return file.getvalue()

  class Pictures(OrderedBuilder, skip_registration=True):
    VERSION = tfds.core.Version('1.0.0')
    SOURCE_SHA256 = 'd' * 64
    DESCRIPTION = 'pictures of a test, one of them broken'

    def features(self):
      image = tfds.features.Image(shape=(40, 40, 3), encoding_format='png')
      return {'image': image, 'label': tfds.features.ClassLabel(num_classes=2)}

    def splits(self):
      broken = png()[:200] if content is None else content
      files = [png()] * 150 + [broken]
      return {'train': [{'image': io.BytesIO(file), 'label': 1} for file in files]}

  prepare(Pictures, tmp_path)
  stream = make_stream(
    'pictures',
    **{'split': 'train', 'objective': 'classify', 'batch_size': 1, 'seed': 0},
    data_dir=tmp_path,
  )
  assert (stream.num_records, stream.skipped) == (150, 1)


def test_another_type_of_pixels_stops(make_images):
  floats = [(image.astype(np.float32), label) for image, label in _good(3)]
  with pytest.raises(DataError, match='dtype float32, expected uint8'):
    _images(make_images(floats, dtype=np.float32))


def test_reserved_bytes_in_a_document_skip_it(make_text):
  data_dir = make_text([b'abc'] * 60 + [b'a\xffc'] + [b'abc'] * 60)
  stream = make_stream(
    'small_text',
    **{'split': 'train', 'objective': 'causal', 'batch_size': 1, 'seed': 0, 'train': False},
    sequence_length=480,
    data_dir=data_dir,
  )
  assert stream.skipped == 1
  assert bytes(stream.batch(0)['tokens'][0].astype(np.uint8)) == b'\xffabc' * 120


def _damage(data_dir, change):
  (path,) = data_dir.glob('small_images/1.0.0/*array_record*')
  path.write_bytes(bytes(change(bytearray(path.read_bytes()))))


def _flip(content):
  content[65536 + 60] ^= 4  # the first block after the header's
  return content


@pytest.mark.parametrize(
  'change',
  [_flip, lambda content: content[: len(content) // 2], lambda content: content[:0]],
  ids=['one flipped bit', 'truncated', 'empty'],
)
@pytest.mark.parametrize('indexed', [False, True])
def test_a_damaged_file_stops_and_names_the_folder(make_images, change, indexed):
  data_dir = make_images(_good(50))
  if indexed:
    _images(data_dir)
  _damage(data_dir, change)
  with pytest.raises(DataError, match=r'cannot be read .* are damaged; remove that folder'):
    _images(data_dir).batch(0)


def test_the_index_is_read_from_its_file_and_made_again_when_that_is_broken(
  make_images, monkeypatch
):
  data_dir = make_images(_good(20))
  first = _images(data_dir).batch(1)
  (path,) = (data_dir / 'index').glob('*.npz')
  made = []
  build = records._build
  monkeypatch.setattr(records, '_build', lambda *args: made.append(1) or build(*args))
  np.testing.assert_equal(_images(data_dir).batch(1), first)
  assert made == []
  path.write_bytes(path.read_bytes()[:40])
  np.testing.assert_equal(_images(data_dir).batch(1), first)
  assert made == [1]
  _images(data_dir)
  assert made == [1]


def test_a_folder_that_cannot_keep_the_index_only_costs_the_pass(make_images):
  data_dir = make_images(_good(20))
  (data_dir / 'index').write_text('a file where the folder should be')
  assert _images(data_dir).num_records == 20


def test_the_cache_keeps_what_was_used_last_within_its_bytes():
  made = []

  def make(key):
    made.append(key)
    return (np.full(10, key, np.uint8),)

  cache = Cache(make, limit=25)
  for key in (0, 1, 0, 2, 0, 1):
    assert cache[key][0].tolist() == [key] * 10
  assert made == [0, 1, 2, 1]  # 2 displaced 1, and not 0
