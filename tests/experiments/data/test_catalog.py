"""Names, splits and folders: what opens, and the sentence for what does not."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import make_stream
from experiments.data.builders import OrderedBuilder, prepare
from experiments.data.catalog import open_dataset, resolve_data_dir
from experiments.errors import BadInput


def test_the_data_dir_is_the_argument_else_the_environment_now_else_the_cache(monkeypatch):
  monkeypatch.setenv('HOME', '/home/someone')
  monkeypatch.delenv('MOEJAX_DATA', raising=False)
  assert str(resolve_data_dir()) == '/home/someone/.cache/moejax/data'
  monkeypatch.setenv('MOEJAX_DATA', '~/elsewhere')
  assert str(resolve_data_dir()) == '/home/someone/elsewhere'
  assert str(resolve_data_dir('')) == '/home/someone/elsewhere'
  assert str(resolve_data_dir('/given')) == '/given'


@pytest.mark.parametrize(
  ('name', 'sentence'),
  [
    ('wiki5', "did you mean 'wiki6'"),
    ('minst5k', "did you mean 'mnist5k'"),
    ('cifar01', "did you mean 'cifar10'"),
    ('zzzzzzzz', "accepted are 'wiki6', 'mnist5k' and prepared TFDS names"),
    ('no such name', 'is not a TFDS name'),
    ('', 'is not a TFDS name'),
  ],
)
def test_an_unknown_name_gets_the_nearest_one(name, sentence, tmp_path):
  with pytest.raises(BadInput, match=sentence) as error:
    open_dataset(name, 'train', tmp_path)
  assert f'data.name={name!r}' in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['c4/en', 'imagenet2012', 'lm1b:1.1.0'])
def test_a_tfds_name_that_is_not_prepared_gets_the_command_that_prepares_it(name, tmp_path):
  with pytest.raises(BadInput) as error:
    open_dataset(name, 'train', tmp_path)
  assert f'tfds build {name} --data_dir={tmp_path} --file_format=array_record' in str(error.value)


@pytest.mark.parametrize(
  ('split', 'sentence'),
  [
    ('trian', "'trian' is not in wiki6/1.0.0: did you mean 'train'"),
    ('zzz', 'it has train, validation, test'),
    ('train[:', 'is not in wiki6'),
    ('test[:1%]', 'has none of the .* records of .test. in wiki6/1.0.0'),
  ],
)
def test_an_unknown_split_gets_the_nearest_one(split, sentence, data_dir):
  with pytest.raises(BadInput, match=sentence.replace('[', r'\[')):
    open_dataset('wiki6', split, data_dir)


def test_a_slice_of_a_split_opens(data_dir):
  whole, slice_ = (open_dataset('wiki6', split, data_dir) for split in ('train', 'train[10:15]'))
  assert len(slice_.records) == 5
  assert slice_.records[0] == whole.records[10] != whole.records[0]


class Compressed(OrderedBuilder, skip_registration=True):
  """PNG images, as most image data sets of TFDS hold them."""

  VERSION = tfds.core.Version('1.0.0')
  SOURCE_SHA256 = 'c' * 64
  DESCRIPTION = 'compressed images of a test'

  def features(self):
    return {
      'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
      'label': tfds.features.ClassLabel(num_classes=4),
    }

  def splits(self):
    image = pytest.importorskip('PIL.Image')

    def png(number, height, width):
      file = io.BytesIO()
      pixels = np.full((height, width, 3), 40 * number, np.uint8)
      pixels[:, :, 1] = 7
      image.fromarray(pixels).save(file, 'png')
      file.seek(0)
      return file

    return {'train': [{'image': png(i, 12 + i, 20), 'label': i} for i in range(4)]}


def test_compressed_images_are_decoded_without_tensorflow_and_brought_to_one_size(tmp_path):
  prepare(Compressed, tmp_path)
  arguments = {'split': 'train', 'objective': 'classify', 'batch_size': 4, 'seed': 0}
  with pytest.raises(BadInput, match='differ in size: give image_size'):
    make_stream('compressed', **arguments, data_dir=tmp_path)
  stream = make_stream('compressed', **arguments, data_dir=tmp_path, train=False, image_size=8)
  batch = stream.batch(0)
  assert stream.image_shape == batch['image'].shape[1:] == (8, 8, 3)
  assert batch['label'].tolist() == [0, 1, 2, 3]
  pixels = np.stack([[40 * i, 7, 40 * i] for i in range(4)])[:, None, None, :]
  np.testing.assert_allclose(
    batch['image'], np.broadcast_to(pixels / 127.5 - 1, (4, 8, 8, 3)), atol=1e-6
  )


def test_reading_compressed_images_without_pillow_says_what_to_install(tmp_path, monkeypatch):
  prepare(Compressed, tmp_path)
  module = sys.modules['tensorflow_datasets.core.features.image_feature']
  monkeypatch.setattr(module, 'PIL_Image', None)
  monkeypatch.setattr(module, 'cv2', None)
  with pytest.raises(BadInput, match='needs Pillow or OpenCV: pip install pillow'):
    make_stream(
      'compressed',
      split='train',
      objective='classify',
      batch_size=1,
      seed=0,
      data_dir=tmp_path,
      image_size=8,
    )


def test_a_data_set_without_random_access_gets_the_command_that_converts_it(tmp_path):
  path = prepare(Compressed, tmp_path).data_path
  info = path / 'dataset_info.json'
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  for file in path.glob('*array_record*'):
    file.rename(str(file).replace('array_record', 'tfrecord'))
  with pytest.raises(BadInput, match=r'prepared as tfrecord.*tfds convert_format'):
    open_dataset('compressed', 'train', tmp_path)


def test_preparing_and_reading_import_no_tensorflow_pandas_or_sklearn(tmp_path):
  program = """
import sys
import experiments.data as data
assert 'tensorflow_datasets' not in sys.modules and 'grain' not in sys.modules
shared = dict(batch_size=2, seed=0, data_dir=sys.argv[1])
images = data.make_stream('mnist5k', split='test', objective='classify', **shared)
assert images.batch(0)['image'].shape == (2, 28, 28, 1)
text = data.make_stream('wiki6', split='test', objective='masked', sequence_length=64, **shared)
assert text.batch(0)['tokens'].shape == (2, 64)
banned = {'tensorflow', 'pandas', 'sklearn', 'gensim', 'mlxtend', 'torch'}
assert not banned & set(sys.modules), banned & set(sys.modules)
"""
  done = subprocess.run(
    [sys.executable, '-c', program, str(tmp_path)], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
