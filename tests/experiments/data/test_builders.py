"""Preparing the embedded data sets: sizes, order, and two callers at once."""

import json
import threading

import numpy as np
import pytest

from experiments.data import builders, sources
from experiments.data.builders import Mnist5k, Wiki6, prepare
from experiments.errors import DataError, StorageError


def _records(builder, split):
  return list(builder.as_data_source(split))


def test_the_splits_of_wiki6_joined_are_the_source_file(data_dir):
  builder = prepare(Wiki6, data_dir)
  splits = {name: _records(builder, name) for name in ('train', 'validation', 'test')}
  joined = [record for records in splits.values() for record in records]
  assert b''.join(record['text'] for record in joined) == sources.read(sources.WIKI6)
  assert [record['index'] for record in joined] == list(range(206))
  assert {name: len(records) for name, records in splits.items()} == {
    'train': 190,
    'validation': 10,
    'test': 6,
  }


def test_the_document_cut_by_a_split_boundary_lies_in_the_earlier_split(data_dir):
  builder = prepare(Wiki6, data_dir)
  sizes = [
    sum(len(record['text']) for record in _records(builder, name))
    for name in ('train', 'validation', 'test')
  ]
  assert sizes == [5_489_021, 322_051, 278_674]  # 90 % is 5,480,771.4 bytes, 95 % 5,785,258.7


def test_every_document_of_wiki6_is_one_page(data_dir):
  builder = prepare(Wiki6, data_dir)
  for name in ('train', 'validation', 'test'):
    for record in _records(builder, name):
      assert record['text'].count(b'  <page>\n') == record['text'].count(b'</page>') == 1


def test_mnist5k_has_400_training_and_100_test_images_of_each_class(data_dir):
  builder = prepare(Mnist5k, data_dir)
  for split, count in (('train', 400), ('test', 100)):
    records = _records(builder, split)
    assert np.bincount([record['label'] for record in records]).tolist() == [count] * 10
    assert {(record['image'].shape, record['image'].dtype.name) for record in records} == {
      ((28, 28, 1), 'uint8')
    }


def test_three_nearest_neighbours_classify_mnist5k_as_well_as_is_known(data_dir):
  builder = prepare(Mnist5k, data_dir)
  arrays = {}
  for split in ('train', 'test'):
    records = _records(builder, split)
    pixels = np.stack([record['image'].ravel() for record in records]).astype(np.float32)
    arrays[split] = pixels, np.array([record['label'] for record in records])
  (train, labels), (test, expected) = arrays['train'], arrays['test']
  distances = np.square(train).sum(axis=1)[None, :] - 2 * test @ train.T
  nearest = labels[np.argpartition(distances, 3, axis=1)[:, :3]]
  votes = [np.bincount(row, minlength=10).argmax() for row in nearest]
  assert np.mean(votes == expected) == pytest.approx(0.934, abs=0.002)


def test_two_callers_at_once_prepare_once_and_both_read(tmp_path, monkeypatch):
  made = []
  splits = Mnist5k.splits
  monkeypatch.setattr(Mnist5k, 'splits', lambda self: made.append(1) or splits(self))
  barrier, lengths = threading.Barrier(2), []

  def work():
    barrier.wait()
    lengths.append(len(prepare(Mnist5k, tmp_path).as_data_source('test')))

  threads = [threading.Thread(target=work) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert lengths == [1000, 1000]
  assert made == [1]


def test_a_prepared_data_set_needs_no_source(data_dir, monkeypatch):
  prepare(Mnist5k, data_dir)
  monkeypatch.setattr(sources, 'read', lambda source: pytest.fail('the source was read again'))
  assert prepare(Mnist5k, data_dir).info.splits['test'].num_examples == 1000


def test_a_failure_in_the_middle_leaves_nothing_prepared(tmp_path, monkeypatch):
  def broken(self):
    yield {'text': b'one', 'index': 0}
    raise OSError('the disk went away')

  monkeypatch.setattr(Wiki6, 'splits', lambda self: {'train': broken(self)})
  with pytest.raises(StorageError, match='cannot be written: the disk went away'):
    prepare(Wiki6, tmp_path)
  monkeypatch.undo()
  assert prepare(Wiki6, tmp_path).info.splits['train'].num_examples == 190


def test_a_file_in_the_place_of_the_folder_is_refused_with_its_path(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(StorageError, match=f'data_dir={file} cannot be written: File exists'):
    prepare(Mnist5k, file)


def test_a_data_set_prepared_from_other_bytes_is_refused(tmp_path):
  builder = prepare(Mnist5k, tmp_path)
  path = tmp_path / 'mnist5k' / '1.0.0' / 'metadata.json'
  path.write_text(json.dumps({**dict(builder.info.metadata), 'source_sha256': 'f' * 64}))
  with pytest.raises(DataError, match=r'prepared from a source with sha256=f{64}.*expects 846f6c'):
    prepare(Mnist5k, tmp_path)


def test_the_embedded_names_are_those_of_the_builders():
  assert builders.EMBEDDED == {'wiki6': Wiki6, 'mnist5k': Mnist5k}
