"""Tokenizers: round trips, specials, fingerprints and the sentences for what is missing."""

import json
import sys

import numpy as np
import pytest

from experiments.data import make_tokenizer
from experiments.data.errors import InvalidRecord
from experiments.errors import BadInput


def test_bytes_are_their_own_ids():
  tokenizer = make_tokenizer('bytes')
  ids = tokenizer.encode('Aé')
  assert ids.dtype == np.int32
  assert ids.tolist() == [65, 0xC3, 0xA9]
  assert tokenizer.encode(b'A\xc3\xa9').tolist() == ids.tolist()
  assert tokenizer.decode(ids) == 'Aé'


def test_the_byte_vocabulary_is_256_for_every_objective_as_specials_are_no_utf8():
  for mask in (False, True):
    tokenizer = make_tokenizer('bytes', mask=mask)
    assert tokenizer.vocab_size == 256
    assert (tokenizer.separator_id, tokenizer.mask_id) == (255, 254)
  every_character = ''.join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
  assert tokenizer.encode(every_character).max() < 254
  assert tokenizer.decode(tokenizer.encode(every_character)) == every_character


def test_decoding_leaves_out_specials_and_marks_broken_utf8():
  tokenizer = make_tokenizer('bytes')
  assert tokenizer.decode([255, 72, 254, 105, 0xC3, 255]) == 'Hi�'
  assert tokenizer.decode([]) == ''


@pytest.mark.parametrize('ids', [[256], [-1], [3, 1000]])
def test_an_id_outside_the_vocabulary_is_refused(ids):
  with pytest.raises(ValueError, match='vocab_size=256'):
    make_tokenizer('bytes').decode(ids)


@pytest.mark.parametrize('text', [b'ab\xffc', b'\xfe'])
def test_reserved_bytes_have_no_encoding(text):
  with pytest.raises(InvalidRecord, match='is reserved'):
    make_tokenizer('bytes').encode(text)


@pytest.mark.parametrize('spec', ['byte', 'hf', 'hf:', 'bytes:', 'wordpiece:x', ''])
def test_an_unknown_specification_lists_the_accepted(spec):
  with pytest.raises(BadInput, match="is not one of 'bytes', 'hf:path/to/tokenizer.json'"):
    make_tokenizer(spec)


@pytest.mark.parametrize('kind', ['hf', 'sentencepiece'])
def test_a_missing_file_is_named(kind, tmp_path):
  with pytest.raises(BadInput, match='absent.json: there is no such file'):
    make_tokenizer(f'{kind}:{tmp_path}/absent.json')


@pytest.mark.parametrize(
  ('kind', 'package'),
  [('hf', 'tokenizers'), ('sentencepiece', 'sentencepiece'), ('tiktoken', 'tiktoken')],
)
def test_a_missing_package_is_named(kind, package, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, package, None)
  (tmp_path / 'file').write_text('{}')
  with pytest.raises(BadInput, match=f'needs the package {package}: install the extra'):
    make_tokenizer(f'{kind}:{tmp_path}/file')


def _word_level(path, words):
  """A tokenizer.json that splits at white space."""
  vocabulary = {word: number for number, word in enumerate(words)}
  special = [word for word in words if word.startswith(('[', '<'))]
  content = {
    'version': '1.0',
    'added_tokens': [
      {'id': vocabulary[word], 'content': word, 'special': True}
      | dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
      for word in special
    ],
    'normalizer': None,
    'pre_tokenizer': {'type': 'WhitespaceSplit'},
    'post_processor': None,
    'decoder': None,
    'model': {'type': 'WordLevel', 'vocab': vocabulary, 'unk_token': words[0]},
  }
  path.write_text(json.dumps(content))
  return f'hf:{path}'


def test_a_tokenizer_file_with_specials_keeps_its_vocabulary(tmp_path):
  pytest.importorskip('tokenizers', reason="the extra 'hf' is not installed")
  spec = _word_level(tmp_path / 'a.json', ['[UNK]', 'the', 'cat', '[SEP]', '[MASK]'])
  tokenizer = make_tokenizer(spec, mask=True)
  assert tokenizer.encode('the cat ran').tolist() == [1, 2, 0]
  assert (tokenizer.vocab_size, tokenizer.separator_id, tokenizer.mask_id) == (5, 3, 4)
  assert tokenizer.decode([3, 1, 4, 2]) == 'the cat'
  with pytest.raises(InvalidRecord, match='not UTF-8: byte 0xff at 4'):
    tokenizer.encode(b'the \xff')


def test_a_tokenizer_file_without_specials_gets_only_those_the_objective_needs(tmp_path):
  pytest.importorskip('tokenizers', reason="the extra 'hf' is not installed")
  spec = _word_level(tmp_path / 'a.json', ['unknown', 'the', 'cat'])
  causal, masked = make_tokenizer(spec), make_tokenizer(spec, mask=True)
  assert (causal.vocab_size, causal.separator_id, causal.mask_id) == (4, 3, None)
  assert (masked.vocab_size, masked.separator_id, masked.mask_id) == (5, 3, 4)
  assert masked.num_ordinary == 3


def test_the_fingerprint_follows_the_content_and_not_the_path(tmp_path):
  pytest.importorskip('tokenizers', reason="the extra 'hf' is not installed")
  first = make_tokenizer(_word_level(tmp_path / 'a.json', ['unknown', 'the']))
  same = make_tokenizer(_word_level(tmp_path / 'b.json', ['unknown', 'the']))
  other = make_tokenizer(_word_level(tmp_path / 'a.json', ['unknown', 'teh']))
  prints = [first.fingerprint, other.fingerprint, make_tokenizer('bytes').fingerprint]
  assert first.fingerprint == same.fingerprint
  assert len(set(prints)) == 3


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
  pytest.importorskip('tokenizers', reason="the extra 'hf' is not installed")
  (tmp_path / 'a.json').write_text('{"version":')
  with pytest.raises(BadInput, match=r'a\.json is not a tokenizer\.json'):
    make_tokenizer(f'hf:{tmp_path}/a.json')


def test_sentencepiece_models_load_and_round_trip(tmp_path):
  package = pytest.importorskip('sentencepiece', reason="the extra 'hf' is not installed")
  (tmp_path / 'text').write_text('\n'.join(f'the cat number {i} sat on a mat' for i in range(200)))
  package.SentencePieceTrainer.train(
    input=str(tmp_path / 'text'),
    model_prefix=str(tmp_path / 'small'),
    vocab_size=40,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  tokenizer = make_tokenizer(f'sentencepiece:{tmp_path}/small.model', mask=True)
  assert tokenizer.decode(tokenizer.encode('the cat sat on a mat')) == 'the cat sat on a mat'
  assert tokenizer.mask_id == tokenizer.vocab_size - 1  # appended: the model has none
  assert tokenizer.separator_id == 2  # its </s>
  with pytest.raises(BadInput, match='is not a SentencePiece model'):
    make_tokenizer(f'sentencepiece:{tmp_path}/text')


def test_an_unknown_tiktoken_name_lists_the_known():
  pytest.importorskip('tiktoken', reason="the extra 'hf' is not installed")
  with pytest.raises(BadInput, match='tiktoken:gpt9 is not one of .*gpt2'):
    make_tokenizer('tiktoken:gpt9')
