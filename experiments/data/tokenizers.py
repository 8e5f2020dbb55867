"""Tokenizers by specification: 'bytes', 'hf:FILE', 'sentencepiece:FILE', 'tiktoken:NAME'.

Every tokenizer has a separator id, which stands before each document (and so also ends the one
before it), and a mask id where the objective is masked. The byte tokenizer takes both from the
bytes that no UTF-8 text contains: 0xFF separates and 0xFE masks, so its vocabulary is exactly 256
for every objective. A tokenizer file that names no such token gets one more id at its end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from experiments.data.errors import InvalidRecord
from experiments.errors import BadInput

BYTE_SEPARATOR, BYTE_MASK = 0xFF, 0xFE
_SEPARATORS = ('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[SEP]')
_MASKS = ('[MASK]', '<mask>')
_ACCEPTED = "'bytes', 'hf:path/to/tokenizer.json', 'sentencepiece:path.model', 'tiktoken:name'"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to ids and back.

  vocab_size counts the specials. `num_ordinary` is how many ids, from 0, a random token is drawn
  from. `mask_id` is None where the objective needs none. The fingerprint is a hash of the
  vocabulary and the specials, not of the path.
  """

  vocab_size: int
  num_ordinary: int
  separator_id: int
  mask_id: int | None
  fingerprint: str
  encode_text: Callable[[bytes], Iterable[int] | np.ndarray]
  decode_ids: Callable[[list[int]], str]

  def encode(self, text: bytes | str) -> np.ndarray:
    """int32 ids [S], without specials. Raises InvalidRecord for text that has no encoding."""
    raw = text.encode() if isinstance(text, str) else text
    return np.asarray(self.encode_text(raw), np.int32)

  def decode(self, ids: Iterable[int] | np.ndarray) -> str:
    """The text of `ids`, specials left out; ValueError for an id outside the vocabulary."""
    numbers = np.asarray(list(ids), np.int64)
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.vocab_size:
      raise ValueError(f'ids reach {numbers.min()}..{numbers.max()}, vocab_size={self.vocab_size}')
    specials = (self.separator_id, self.mask_id)
    return self.decode_ids([number for number in numbers.tolist() if number not in specials])


def make_tokenizer(spec: str, *, mask: bool = False) -> Tokenizer:
  """The tokenizer that `spec` names; with `mask`, one that has a mask id.

  Raises:
    BadInput: unknown specification, package not installed, or file missing or unreadable.
  """
  kind, _, argument = spec.partition(':')
  if spec == 'bytes':
    return _byte_tokenizer()
  if kind not in _LOADERS or not argument:
    raise BadInput(f'tokenizer={spec!r} is not one of {_ACCEPTED}')
  return _LOADERS[kind](argument, mask)


def _byte_tokenizer() -> Tokenizer:
  return Tokenizer(
    vocab_size=256,
    num_ordinary=BYTE_MASK,
    separator_id=BYTE_SEPARATOR,
    mask_id=BYTE_MASK,
    fingerprint=_hash(b'bytes', BYTE_SEPARATOR, BYTE_MASK),
    encode_text=_encode_bytes,
    decode_ids=lambda ids: bytes(ids).decode(errors='replace'),
  )


def _encode_bytes(text: bytes) -> np.ndarray:
  for reserved in (BYTE_SEPARATOR, BYTE_MASK):
    if reserved in text:
      raise InvalidRecord(f'byte {reserved:#x} at {text.index(reserved)} is reserved (not UTF-8)')
  return np.frombuffer(text, np.uint8)


def _hugging_face(path: str, mask: bool) -> Tokenizer:
  file, package = _file('hf', path), _package('tokenizers')
  content = file.read_bytes()
  try:
    json.loads(content)
  except ValueError as error:
    raise BadInput(f'tokenizer hf:{path} is not a tokenizer.json: {error}') from error
  model = package.Tokenizer.from_str(content.decode())
  return _with_specials(
    content,
    model.get_vocab_size(with_added_tokens=True),
    separator=_first_id(model.token_to_id, _SEPARATORS),
    mask_id=_first_id(model.token_to_id, _MASKS),
    mask=mask,
    encode_text=lambda raw: model.encode(_utf8(raw), add_special_tokens=False).ids,
    decode_ids=lambda ids: model.decode(ids, skip_special_tokens=False),
  )


def _sentencepiece(path: str, mask: bool) -> Tokenizer:
  file, package = _file('sentencepiece', path), _package('sentencepiece')
  try:
    model = package.SentencePieceProcessor(model_file=str(file))
  except (OSError, RuntimeError) as error:
    raise BadInput(f'tokenizer sentencepiece:{path} is not a SentencePiece model') from error

  def token_id(piece: str) -> int | None:
    found = model.piece_to_id(piece)
    return None if found == model.unk_id() else found

  return _with_specials(
    file.read_bytes(),
    model.vocab_size(),
    separator=model.eos_id() if model.eos_id() >= 0 else None,
    mask_id=_first_id(token_id, _MASKS),
    mask=mask,
    encode_text=lambda raw: model.encode(_utf8(raw)),
    decode_ids=model.decode,
  )


def _tiktoken(name: str, mask: bool) -> Tokenizer:
  package = _package('tiktoken')
  try:
    model = package.get_encoding(name)
  except ValueError as error:
    known = ', '.join(package.list_encoding_names())
    raise BadInput(f'tokenizer=tiktoken:{name} is not one of {known}') from error
  except OSError as error:
    raise BadInput(
      f'tokenizer=tiktoken:{name} is not in the cache and cannot be downloaded: '
      'set TIKTOKEN_CACHE_DIR to a folder that holds it'
    ) from error
  return _with_specials(
    b''.join(sorted(model.token_byte_values())) + name.encode(),
    model.n_vocab,
    separator=model.eot_token,
    mask_id=None,
    mask=mask,
    encode_text=lambda raw: model.encode_ordinary(_utf8(raw)),
    decode_ids=model.decode,
  )


_LOADERS: dict[str, Callable[[str, bool], Tokenizer]] = {
  'hf': _hugging_face,
  'sentencepiece': _sentencepiece,
  'tiktoken': _tiktoken,
}


def _with_specials(
  content: bytes,
  size: int,
  *,
  separator: int | None,
  mask_id: int | None,
  mask: bool,
  encode_text: Callable[[bytes], Iterable[int]],
  decode_ids: Callable[[list[int]], str],
) -> Tokenizer:
  """Appends to the `size` ids of a vocabulary the separator and the mask that it lacks."""
  vocab_size = size
  if separator is None:
    separator, vocab_size = vocab_size, vocab_size + 1
  if mask and mask_id is None:
    mask_id, vocab_size = vocab_size, vocab_size + 1
  mask_id = mask_id if mask else None
  return Tokenizer(
    vocab_size=vocab_size,
    num_ordinary=size,
    separator_id=separator,
    mask_id=mask_id,
    fingerprint=_hash(content, separator, mask_id),
    encode_text=encode_text,
    decode_ids=decode_ids,
  )


def _hash(content: bytes, *specials: int | None) -> str:
  return hashlib.sha256(content + repr(specials).encode()).hexdigest()[:16]


def _first_id(lookup: Callable[[str], int | None], tokens: Sequence[str]) -> int | None:
  return next((found for token in tokens if (found := lookup(token)) is not None), None)


def _utf8(raw: bytes) -> str:
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise InvalidRecord(f'not UTF-8: byte {raw[error.start]:#x} at {error.start}') from error


def _file(kind: str, path: str) -> Path:
  file = Path(path).expanduser()
  if not file.is_file():
    raise BadInput(f'tokenizer={kind}:{path}: there is no such file')
  return file


def _package(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise BadInput(
      f"this tokenizer needs the package {name}: install the extra 'hf' (pip install '.[hf]')"
    ) from error
