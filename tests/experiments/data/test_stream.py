"""The stream: a pure function of seed and step, for any number of processes, and its identity."""

import hashlib
import json

import numpy as np
import pytest

from experiments.data import DataMismatch, check_fingerprint, make_stream
from experiments.errors import BadInput

KINDS = ('causal', 'masked', 'classify')


@pytest.fixture
def stream_of(text_stream, image_stream):
  def make(objective, **options):
    if objective == 'classify':
      return image_stream(**options)
    return text_stream(objective=objective, **options)

  return make


def _hash(batch):
  digest = hashlib.sha256()
  for key in sorted(batch):
    digest.update(key.encode() + batch[key].tobytes())
  return digest.hexdigest()


def _join(batches):
  return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


@pytest.mark.parametrize('objective', KINDS)
def test_a_batch_depends_on_the_step_alone_in_any_order_and_any_stream(stream_of, objective):
  stream = stream_of(objective)
  steps = [0, 1, 500, 1340, 1341, 10**6]
  hashes = [_hash(stream.batch(step)) for step in steps]
  assert len(set(hashes)) == len(steps)
  fresh = stream_of(objective)
  assert [_hash(fresh.batch(step)) for step in reversed(steps)] == hashes[::-1]


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('objective', KINDS)
@pytest.mark.parametrize('process_count', [2, 4, 8])
def test_the_shares_of_the_processes_joined_are_the_batch_of_one(
  stream_of, objective, process_count, train
):
  options = {'split': 'train[:25]', 'batch_size': 8, 'train': train}
  whole = stream_of(objective, **options)
  parts = [
    stream_of(objective, **options, process_index=index, process_count=process_count)
    for index in range(process_count)
  ]
  last = whole.num_batches - 1
  for step in (0, 1, last):
    np.testing.assert_equal(_join([part.batch(step) for part in parts]), whole.batch(step))
  assert all(part.fingerprint == whole.fingerprint for part in parts)


def test_an_epoch_has_every_window_once_and_the_next_another_order(text_stream):
  stream = text_stream(split='train[:40]', sequence_length=512)
  ordered = text_stream(split='train[:40]', sequence_length=512, train=False)
  count = stream.num_records
  assert count > 100

  def rows(source, first, number):
    batches = [source.batch(step)['tokens'] for step in range((first + number) // 16 + 1)]
    return [row.tobytes() for row in np.concatenate(batches)[first : first + number]]

  epochs = [rows(stream, 0, count), rows(stream, count, count)]
  expected = sorted(row.tobytes() for row in ordered_rows(ordered)[:count])
  assert sorted(epochs[0]) == sorted(epochs[1]) == expected
  same = sum(a == b for a, b in zip(*epochs, strict=True))
  assert same < 10  # a random order keeps about one in place


def ordered_rows(stream):
  return np.concatenate([stream.batch(step)['tokens'] for step in range(stream.num_batches)])


def test_seeds_give_unrelated_orders_even_one_epoch_apart(text_stream):
  """grain's own shuffle of seed s in epoch 1 is that of seed s + 1 in epoch 0: here it is not."""
  options = {'split': 'train[:16]', 'sequence_length': 64}
  zero, one = (text_stream(seed=seed, **options) for seed in (0, 1))
  count = zero.num_records
  second = [zero.dataset[count + i]['tokens'].tobytes() for i in range(count)]
  first = [one.dataset[i]['tokens'].tobytes() for i in range(count)]
  assert count > 300
  assert sum(a == b for a, b in zip(first, second, strict=True)) < count / 10


def test_resuming_across_an_epoch_boundary_continues_the_unbroken_stream(text_stream):
  options = {'split': 'train[:12]', 'batch_size': 8}
  unbroken = text_stream(**options)
  boundary = unbroken.num_records // 8
  hashes = [_hash(unbroken.batch(step)) for step in range(2 * boundary)]
  assert len(set(hashes)) == len(hashes)
  for stop in (boundary - 1, boundary, boundary + 1):
    resumed = text_stream(**options)
    assert [_hash(resumed.batch(step)) for step in range(stop, 2 * boundary)] == hashes[stop:]


def test_orders_and_masks_are_those_of_the_version_in_the_fingerprint(image_stream, text_stream):
  """Golden values: if grain or NumPy changes them, `stream.RANDOMNESS` has to change too."""
  images, text = image_stream(), text_stream(objective='masked', batch_size=4)
  randomness = 'grain-index-shuffle-1 numpy-philox-1'
  assert images.fingerprint['randomness'] == text.fingerprint['randomness'] == randomness
  labels = [images.batch(step)['label'].tolist() for step in (0, 1, 500)]  # 500: a second epoch
  assert labels == [[4, 8, 3, 7, 4, 1, 7, 6], [2, 7, 0, 4, 7, 5, 1, 1], [0, 1, 6, 6, 1, 2, 4, 6]]
  chosen = np.flatnonzero(text.batch(0)['loss_mask'][0])
  assert chosen[:12].tolist() == [1, 6, 13, 27, 28, 32, 34, 38, 40, 46, 63, 72]
  tokens = text.batch(0)['tokens'].tobytes()
  assert hashlib.sha256(tokens).hexdigest()[:16] == '2d78996a84484c3a'


def test_evaluation_is_one_pass_in_order_and_pads_the_last_batch(image_stream):
  stream = image_stream(split='test', train=False, batch_size=300)
  assert stream.num_batches == 4
  batches = [stream.batch(step) for step in range(4)]
  assert [int(batch['valid'].sum()) for batch in batches] == [300, 300, 300, 100]
  assert {batch['image'].shape for batch in batches} == {(300, 28, 28, 1)}
  labels = np.concatenate([batch['label'][batch['valid']] for batch in batches])
  assert labels.tolist() == sorted(labels.tolist())  # the source is sorted by class
  with pytest.raises(IndexError, match='step=4 is not at least 0 and less than num_batches=4'):
    stream.batch(4)


def test_rows_that_pad_a_text_batch_count_for_nothing(text_stream):
  stream = text_stream(split='test', train=False, batch_size=1000)
  batch = stream.batch(1)
  assert batch['valid'].sum() == 89
  assert not batch['loss_mask'][89:].any()
  assert not batch['segment_ids'][89:].any()
  assert (batch['segment_ids'][:88] > 0).all()
  assert batch['loss_mask'][:88].all()


def test_a_batch_larger_than_the_data_spans_epochs(make_images):
  data_dir = make_images([(np.full((4, 4, 1), i, np.uint8), i % 3) for i in range(3)])
  stream = make_stream(
    'small_images',
    **{'split': 'train', 'objective': 'classify', 'batch_size': 9, 'seed': 0},
    data_dir=data_dir,
  )
  assert np.bincount(stream.batch(5)['label']).tolist() == [3, 3, 3]


def test_a_negative_step_is_refused(image_stream):
  with pytest.raises(IndexError, match='step=-1 is not at least 0'):
    image_stream().batch(-1)


def test_the_stream_tells_a_model_what_it_needs(text_stream, image_stream):
  text, images = text_stream(), image_stream()
  assert (text.vocab_size, text.num_classes, text.image_shape) == (256, None, None)
  assert (images.vocab_size, images.num_classes, images.image_shape) == (None, 10, (28, 28, 1))
  assert (text.num_records, text.num_batches, text.num_bytes) == (21_442, 1_341, 5_489_021)
  assert (images.num_records, images.num_batches, images.num_bytes) == (4_000, 500, None)
  assert text.skipped == images.skipped == 0


@pytest.mark.parametrize(
  ('change', 'sentence'),
  [
    ({'objective': 'seq2seq'}, "objective='seq2seq' is not one of causal, masked, classify"),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'batch_size': 6, 'process_count': 4}, 'batch_size=6 is not a multiple of process_count=4'),
    ({'process_index': 2, 'process_count': 2}, 'process_index=2 is not from 0 to 1'),
    ({'seed': -1}, 'seed=-1 is not 0 or more'),
    ({'sequence_length': None}, 'sequence_length=None is not at least 1'),
    ({'objective': 'masked', 'mask_rate': 0.0}, 'mask_rate=0.0 is not more than 0'),
    ({'objective': 'masked', 'mask_rate': 1.5}, 'mask_rate=1.5 is not more than 0'),
  ],
)
def test_arguments_that_cannot_be_served_are_named(text_stream, change, sentence):
  with pytest.raises(BadInput, match=sentence):
    text_stream(**change)


@pytest.mark.parametrize('objective', KINDS)
def test_the_fingerprint_is_flat_survives_json_and_agrees_with_itself(stream_of, objective):
  current = stream_of(objective).fingerprint
  saved = json.loads(json.dumps(current))
  assert not any(isinstance(value, dict) for value in saved.values())
  check_fingerprint(saved, stream_of(objective).fingerprint)


@pytest.mark.parametrize(
  ('field', 'change'),
  [
    ('batch_size', {'batch_size': 32}),
    ('mask_rate', {'mask_rate': 0.3}),
    ('objective', {'objective': 'causal'}),
    ('seed', {'seed': 1}),
    ('sequence_length', {'sequence_length': 128}),
    ('split', {'split': 'train[:50%]'}),
    ('train', {'train': False}),
  ],
)
def test_a_changed_setting_is_refused_by_name(text_stream, field, change):
  saved = text_stream(objective='masked').fingerprint
  current = text_stream(**{'objective': 'masked', **change}).fingerprint
  with pytest.raises(DataMismatch, match=rf'{field}=.*allow_changed_stream=true') as error:
    check_fingerprint(saved, {**current, **{k: saved[k] for k in saved if k not in current}})
  assert repr(saved[field]) in str(error.value)
  assert repr(current[field]) in str(error.value)


@pytest.mark.parametrize('objective', KINDS)
def test_every_field_that_differs_or_is_absent_is_refused(stream_of, objective):
  current = stream_of(objective).fingerprint
  for field in current:
    with pytest.raises(DataMismatch, match=f"changed: {field}=.*checkpoint has 'other'"):
      check_fingerprint({**current, field: 'other'}, current)
    without = {key: value for key, value in current.items() if key != field}
    with pytest.raises(DataMismatch, match=f'changed: {field}='):
      check_fingerprint(without, current)
    with pytest.raises(DataMismatch, match=f"changed: {field}='absent'"):
      check_fingerprint(current, without)


def test_changed_source_bytes_and_tokenizers_change_the_fingerprint(make_text, text_stream):
  data_dir = make_text([b'some text'] * 9)
  small = make_stream(
    'small_text',
    **{'split': 'train', 'objective': 'causal', 'batch_size': 16, 'seed': 0},
    sequence_length=4,
    data_dir=data_dir,
  )
  assert small.fingerprint['source_sha256'] == 'a' * 64
  assert issubclass(DataMismatch, ValueError)
  with pytest.raises(DataMismatch, match=r"dataset='small_text/1\.0\.0'.*'wiki6/1\.0\.0'"):
    check_fingerprint(text_stream(sequence_length=4).fingerprint, small.fingerprint)
