"""Packing: the windows are the text, and segments, positions and masks say what lies where."""

import functools

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.data import make_stream
from experiments.data.text import mask_tokens
from experiments.errors import BadInput

SEP, MASK = 255, 254


@pytest.fixture
def stream_of(make_text):
  """The evaluation stream, one batch a window, of some documents."""

  def make(documents, *, sequence_length, train=False, objective='causal', **options):
    return make_stream(
      'small_text',
      **{'split': 'train', 'objective': objective, 'batch_size': 1, 'seed': 3, 'train': train},
      sequence_length=sequence_length,
      data_dir=make_text(documents),
      **options,
    )

  return make


def _row(stream, step):
  return {key: value[0].tolist() for key, value in stream.batch(step).items()}


def test_three_short_documents_in_windows_of_five(stream_of):
  """The stream is |abc|de||  with | the separator: 9 tokens with the last, so two windows."""
  stream = stream_of([b'abc', b'de', b''], sequence_length=5)
  a, b, c, d, e = b'abcde'
  assert stream.num_records == 2
  assert _row(stream, 0) == {
    'tokens': [SEP, a, b, c, SEP],
    'targets': [a, b, c, SEP, d],
    'segment_ids': [1, 1, 1, 1, 2],
    'positions': [0, 1, 2, 3, 0],
    'loss_mask': [True] * 5,
    'valid': True,
  }
  assert _row(stream, 1) == {
    'tokens': [d, e, SEP, SEP, SEP],
    'targets': [e, SEP, SEP, SEP, SEP],
    'segment_ids': [1, 1, 2, 0, 0],
    'positions': [0, 1, 0, 0, 0],
    'loss_mask': [True, True, True, False, False],
    'valid': True,
  }


def test_training_leaves_out_the_partial_window(stream_of):
  assert stream_of([b'abc', b'de', b''], sequence_length=5, train=True).num_records == 1


@pytest.mark.parametrize('sequence_length', [1, 2, 3, 7, 64, 1000])
def test_the_windows_joined_are_the_documents_and_each_token_is_predicted_once(
  stream_of, sequence_length
):
  rng = np.random.default_rng(0)
  documents = [rng.integers(0, 254, size).astype(np.uint8).tobytes() for size in (0, 1, 90, 0, 33)]
  stream = stream_of(documents, sequence_length=sequence_length)
  tokens, targets = [], []
  for step in range(stream.num_batches):
    row = stream.batch(step)
    counts = row['loss_mask']
    tokens += row['tokens'][counts].tolist()
    targets += row['targets'][counts].tolist()
  packed = b''.join(b'\xff' + document for document in documents)
  assert bytes(tokens) == packed
  assert bytes(targets) == packed[1:] + b'\xff'
  assert stream.num_bytes == sum(map(len, documents))


def test_the_windows_of_wiki6_joined_are_its_text_exactly(text_stream, data_dir):
  stream = text_stream(split='validation', train=False)
  batches = [stream.batch(step) for step in range(stream.num_batches)]
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  tokens = joined['tokens'][joined['loss_mask']]
  documents = bytes(tokens.astype(np.uint8)).split(b'\xff')[1:]
  records = tfds.builder_from_directory(data_dir / 'wiki6' / '1.0.0').as_data_source('validation')
  assert documents == [record['text'] for record in records]
  assert joined['valid'].sum() == stream.num_records == 1259
  assert stream.num_bytes == 322_051


def test_segments_and_positions_change_exactly_at_the_separators(text_stream):
  stream = text_stream(split='train[:60]', train=False, sequence_length=2048)
  for step in range(stream.num_batches):
    batch = stream.batch(step)
    real = batch['segment_ids'] > 0
    starts = (batch['tokens'] == SEP) & real
    starts_after_first = starts[:, 1:] & real[:, 1:]
    np.testing.assert_array_equal(
      np.diff(batch['segment_ids'], axis=1)[real[:, 1:]], starts_after_first[real[:, 1:]]
    )
    assert (batch['segment_ids'][:, 0][real[:, 0]] == 1).all()
    assert (batch['positions'][starts] == 0).all()
    assert (batch['positions'][:, 0] == 0).all()
    inside = real[:, 1:] & ~starts[:, 1:]
    assert (np.diff(batch['positions'], axis=1)[inside] == 1).all()


def test_text_shorter_than_a_window_is_refused_in_training(stream_of):
  with pytest.raises(BadInput, match='sequence_length=5 is more than the 4 tokens of'):
    stream_of([b'abc'], sequence_length=5, train=True)


def test_masking_predicts_the_rate_of_the_positions_80_10_10(text_stream):
  stream = text_stream(objective='masked', batch_size=64)
  batches = [stream.batch(step) for step in range(20)]
  joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
  chosen, tokens, targets = (joined[key] for key in ('loss_mask', 'tokens', 'targets'))
  assert ((tokens == targets) | chosen).all()  # nothing else is changed
  assert not (chosen & (targets == SEP)).any()
  assert chosen.sum(axis=1).min() >= 37  # 0.15 * 256 = 38.4, fewer where separators are
  assert chosen.mean() == pytest.approx(38 / 256, rel=0.002)
  # 48,640 draws: standard deviations 0.0018 (of 0.8) and 0.0014 (of 0.1)
  assert (tokens == MASK)[chosen].mean() == pytest.approx(0.8, abs=0.008)
  assert (tokens == targets)[chosen].mean() == pytest.approx(0.1 + 0.1 / 254, abs=0.006)
  random = tokens[chosen & (tokens != MASK) & (tokens != targets)]
  assert random.max() <= 253
  assert random.mean() == pytest.approx(126.5, abs=4)  # uniform over 0..253, deviation 73


@pytest.mark.parametrize('mask_rate', [0.01, 0.5, 1.0])
def test_the_mask_rate_is_exact(text_stream, mask_rate):
  batch = text_stream(objective='masked', mask_rate=mask_rate).batch(0)
  allowed = (batch['targets'] != SEP).sum(axis=1)
  expected = np.maximum(1, np.round(mask_rate * allowed))
  np.testing.assert_array_equal(batch['loss_mask'].sum(axis=1), expected)


def test_positions_are_chosen_evenly(text_stream):
  stream = text_stream(objective='masked', batch_size=64)
  rate = np.mean([stream.batch(step)['loss_mask'] for step in range(32)], axis=(0, 1))
  assert rate.shape == (256,)
  assert np.abs(rate - 38 / 256).max() < 0.04  # 2,048 draws: deviation 0.0078, five of them


def test_masking_differs_between_epochs_and_not_in_evaluation(stream_of):
  documents = [b'x' * 200]
  training = stream_of(documents, sequence_length=200, train=True, objective='masked')
  assert training.num_records == 1
  assert _row(training, 0) != _row(training, 1)
  evaluation = [
    stream_of(documents, sequence_length=200, objective='masked').batch(0) for _ in range(2)
  ]
  np.testing.assert_equal(*evaluation)


def test_a_window_of_separators_alone_predicts_nothing():
  window = {
    'tokens': np.full(4, SEP, np.int32),
    'targets': np.full(4, SEP, np.int32),
    'loss_mask': np.zeros(4, bool),
  }
  rng = np.random.default_rng(0)
  out = mask_tokens(window, rng, mask_id=MASK, num_ordinary=254, mask_rate=0.15)
  assert not out['loss_mask'].any()
  np.testing.assert_array_equal(out['tokens'], window['tokens'])


def test_text_objectives_refuse_images_by_naming_the_features(image_stream):
  with pytest.raises(BadInput, match=r"features image, label.*need one that is 'text'"):
    image_stream(objective='causal', sequence_length=8)


def test_documents_not_utf8_are_read_by_bytes_and_skipped_by_other_tokenizers(make_text, tmp_path):
  pytest.importorskip('tokenizers', reason="the extra 'hf' is not installed")
  data_dir = make_text([b'a b'] * 150 + [b'\xe9t\xe9'])
  (tmp_path / 'a.json').write_text(
    '{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, '
    '"model": {"type": "WordLevel", "vocab": {"?": 0, "a": 1, "b": 2}, "unk_token": "?"}}'
  )
  make = functools.partial(
    make_stream,
    'small_text',
    **{'split': 'train', 'objective': 'causal', 'batch_size': 2, 'seed': 0, 'sequence_length': 3},
    data_dir=data_dir,
  )
  assert make().skipped == 0
  words = make(tokenizer=f'hf:{tmp_path}/a.json', train=False)
  assert words.skipped == 1
  assert words.batch(0)['tokens'].tolist() == [[3, 1, 2], [3, 1, 2]]
