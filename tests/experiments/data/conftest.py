"""Data sets prepared once a session, and a maker of small ones with any records."""

import functools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import make_stream
from experiments.data.builders import OrderedBuilder, prepare


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
  return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='session')
def text_stream(data_dir):
  """make_stream of wiki6 train, S=256, B=16; keywords override."""
  return functools.partial(
    make_stream,
    'wiki6',
    **{
      'split': 'train',
      'objective': 'causal',
      'batch_size': 16,
      'seed': 0,
      'sequence_length': 256,
    },
    data_dir=data_dir,
  )


@pytest.fixture(scope='session')
def image_stream(data_dir):
  """make_stream of mnist5k train, B=8; keywords override."""
  return functools.partial(
    make_stream,
    'mnist5k',
    **{'split': 'train', 'objective': 'classify', 'batch_size': 8, 'seed': 0},
    data_dir=data_dir,
  )


@pytest.fixture
def make_text(tmp_path):
  """Prepares the data set 'small_text' of the given documents and returns its data_dir."""

  def make(documents):
    class SmallText(OrderedBuilder, skip_registration=True):
      VERSION = tfds.core.Version('1.0.0')
      SOURCE_SHA256 = 'a' * 64
      DESCRIPTION = 'documents of a test'

      def features(self):
        return {'text': tfds.features.Text()}

      def splits(self):
        return {'train': [{'text': document} for document in documents]}

    prepare(SmallText, tmp_path)
    return tmp_path

  return make


@pytest.fixture
def make_images(tmp_path):
  """Prepares 'small_images' of (image, label) pairs, 4x4x1 and 3 classes, and returns data_dir."""

  def make(pairs, dtype=np.uint8):
    class SmallImages(OrderedBuilder, skip_registration=True):
      VERSION = tfds.core.Version('1.0.0')
      SOURCE_SHA256 = 'b' * 64
      DESCRIPTION = 'images of a test'
      METADATA = {'image_shape': [4, 4, 1], 'num_classes': 3}  # noqa: RUF012

      def features(self):
        free = tfds.features.Tensor(shape=(None, None, 1), dtype=dtype, encoding='bytes')
        return {'image': free, 'label': tfds.features.Scalar(np.int64)}

      def splits(self):
        return {'train': [{'image': image, 'label': label} for image, label in pairs]}

    prepare(SmallImages, tmp_path)
    return tmp_path

  return make
