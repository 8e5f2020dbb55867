"""Packing documents into windows of S tokens, each found by its number alone.

The token stream is, for each document in order, the separator and then the document's tokens; one
more separator ends it. Window i holds tokens i*S .. i*S+S-1. For a causal model the target is the
next token, so every token and every end of a document is predicted exactly once, and no target
lies in another document than the tokens it is predicted from: a separator, as a target, ends its
document; as an input, it begins the next.
"""

from __future__ import annotations

import numpy as np

from experiments.data.errors import InvalidRecord
from experiments.data.records import Cache, Dataset, Index, read_record
from experiments.data.tokenizers import Tokenizer
from experiments.errors import BadInput

Window = dict[str, np.ndarray]
_KEEP_WORD, _RANDOM_WORD = 0.1, 0.1  # of the chosen positions; the others become the mask id


def text_feature(dataset: Dataset) -> str:
  """The feature that holds the text: 'text', else the only string. Raises BadInput."""
  strings = [
    name
    for name, feature in dataset.features.items()
    if getattr(feature, 'np_dtype', None) == np.object_ and getattr(feature, 'shape', None) == ()
  ]
  if 'text' in strings:
    return 'text'
  if len(strings) != 1:
    raise BadInput(
      f'{dataset.full_name} has the features {", ".join(sorted(dataset.features))}: the objectives '
      "'causal' and 'masked' need one that is 'text' or the only string"
    )
  return strings[0]


def inspect_text(example: dict, feature: str, tokenizer: Tokenizer) -> tuple[int, int]:
  """(tokens, bytes) of a document. Raises InvalidRecord where the tokenizer cannot read it."""
  text = example[feature]
  if not isinstance(text, bytes):
    raise InvalidRecord(f'{feature} is {type(text).__name__}, not text')
  return len(tokenizer.encode(text)), len(text)


class Windows:
  """Random access to the windows of a split; see the module's docstring.

  Window i is a dict of arrays [S]: `tokens` and `targets` int32; `segment_ids` int32, the
  document inside the window counted from 1, and 0 for padding; `positions` int32, from 0 at the
  window's begin and at each document's; `loss_mask` bool, True where the target counts.

  With `causal=False` the targets are the tokens, and `loss_mask` is True where a token may be
  chosen for masking: at all but separators and padding (`mask_tokens` chooses).

  With `pad` the last, partial window is kept: padded with separators whose loss_mask is False.
  Without it up to S-1 tokens at the end are left out.
  """

  def __init__(
    self,
    dataset: Dataset,
    feature: str,
    index: Index,
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    causal: bool,
    pad: bool,
  ):
    self._dataset, self._feature, self._index = dataset, feature, index
    self._tokenizer, self._length, self._causal = tokenizer, sequence_length, causal
    self._starts = np.concatenate([[0], np.cumsum(index.length + 1)])  # [N + 1], +1: separator
    self.num_tokens = int(self._starts[-1])
    whole, rest = divmod(self.num_tokens, sequence_length)
    self._num_windows = whole + (1 if pad and rest else 0)
    self._documents = Cache(self._read_document)

  def __len__(self) -> int:
    return self._num_windows

  def __getitem__(self, number: int) -> Window:
    start, length = number * self._length, self._length
    tokens, segment_ids, positions = self._slice(start, length + 1)
    inputs = tokens[:-1]
    if self._causal:
      counts = start + np.arange(length) < self.num_tokens
    else:
      counts = inputs != self._tokenizer.separator_id  # so is padding
    return {
      'tokens': inputs,
      'targets': tokens[1:] if self._causal else inputs,
      'segment_ids': segment_ids[:-1],
      'positions': positions[:-1],
      'loss_mask': counts,
    }

  def _slice(self, start: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, segments and positions [size] from `start` on; separators beyond the stream's end."""
    tokens = np.full(size, self._tokenizer.separator_id, np.int32)
    segment_ids, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
    document = int(np.searchsorted(self._starts, start, side='right')) - 1
    filled, segment = 0, 1
    while filled < size and document < len(self._index.record):
      offset = start + filled - int(self._starts[document])
      piece = self._documents[document][0][offset : offset + size - filled]
      part = slice(filled, filled + len(piece))
      tokens[part], segment_ids[part], positions[part] = piece, segment, np.arange(len(piece))
      filled, document, segment = filled + len(piece), document + 1, segment + 1
    return tokens, segment_ids, positions

  def _read_document(self, document: int) -> tuple[np.ndarray]:
    """The separator and the tokens of a document."""
    text = read_record(self._dataset, int(self._index.record[document]))[self._feature]
    separator = np.asarray([self._tokenizer.separator_id], np.int32)
    return (np.concatenate([separator, self._tokenizer.encode(text)]),)


def mask_tokens(
  window: Window,
  rng: np.random.Generator,
  *,
  mask_id: int,
  num_ordinary: int,
  mask_rate: float,
) -> Window:
  """Chooses `mask_rate` of the positions for prediction: 80 % masked, 10 % random, 10 % kept.

  Source: Devlin et al., BERT, arXiv 1810.04805, section 3.1. The number of positions is exact (the
  rate of the positions that may be chosen, rounded, at least one), as in BERT's own code; random
  ids are uniform over 0 .. num_ordinary - 1, the vocabulary without the specials appended to it.
  """
  allowed = np.flatnonzero(window['loss_mask'])
  count = min(max(1, round(mask_rate * len(allowed))), len(allowed))
  chosen = rng.permutation(allowed)[:count]
  fate = rng.random(count)
  random_ids = rng.integers(0, num_ordinary, count, dtype=np.int32)
  tokens, loss_mask = window['tokens'].copy(), np.zeros_like(window['loss_mask'])
  masked = np.where(fate < _RANDOM_WORD, random_ids, np.int32(mask_id))
  tokens[chosen] = np.where(fate >= 1 - _KEEP_WORD, tokens[chosen], masked)
  loss_mask[chosen] = True
  return {**window, 'tokens': tokens, 'loss_mask': loss_mask}
