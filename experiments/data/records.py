"""Which records of a split are valid: one pass over it, cached on disk; and reading them by number.

A record that is not valid is skipped and counted, and more than 1 % of them stop the program. As
validity is settled before the first batch, `batch(step)` stays a pure function of seed and step.
Files that are damaged (array_record checks every block) stop the program too: nothing is skipped.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from experiments.data.errors import InvalidRecord
from experiments.errors import BadInput, DataError

MAX_SKIPPED = 0.01  # fraction of the records of a split
INDEX_VERSION = 1  # part of the cache key: raise it when the meaning of the stored arrays changes


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A split of a prepared data set: `records[i]` is record i as stored, `features` decode it."""

  full_name: str  # name, config and version
  split: str
  directory: str
  source_sha256: str
  features: Any  # tfds.features.FeaturesDict
  metadata: dict[str, Any]
  records: Sequence[bytes]


@dataclasses.dataclass(frozen=True)
class Index:
  """The valid records of a split.

  record [N] int64: their numbers in the split; length [N] int64: tokens (1 for an image);
  num_bytes: bytes of text in them (0 for images); skipped: how many records are not valid.
  """

  record: np.ndarray
  length: np.ndarray
  num_bytes: int
  skipped: int


def read_record(dataset: Dataset, number: int) -> dict[str, Any]:
  """Record `number` of the split, decoded.

  Raises:
    InvalidRecord: this record cannot be decoded.
    DataError: the file is damaged.
    BadInput: a package to decode with is missing.
  """
  try:
    return dataset.features.deserialize_example_np(_read_bytes(dataset, number))
  except (ValueError, OSError, SyntaxError) as error:  # SyntaxError is Pillow's, for a broken PNG
    raise InvalidRecord(f'cannot be decoded ({_first_line(error)})') from error
  except ImportError as error:
    raise BadInput(
      f'the images of {dataset.full_name} are compressed, and reading them without TensorFlow '
      'needs Pillow or OpenCV: pip install pillow'
    ) from error


def _read_bytes(dataset: Dataset, number: int) -> bytes:
  reason = 'it is empty'  # so array_record answers for files that were cut at a block of 64 KiB
  try:
    stored = dataset.records[number]
  except RuntimeError as error:
    stored, reason = b'', _first_line(error)
  if not stored:
    raise DataError(
      f'record {number} of {dataset.full_name} {dataset.split} cannot be read ({reason}): '
      f'the files in {dataset.directory} are damaged; remove that folder and prepare it again'
    )
  return stored


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]


def load_index(
  dataset: Dataset,
  inspect: Callable[[dict[str, Any]], tuple[int, int]],
  reader: str,
  data_dir: Path,
) -> Index:
  """The index of `dataset`, from data_dir/index or else by reading every record once.

  Args:
    inspect: (length in tokens, bytes of text) of a record; raises InvalidRecord.
    reader: what besides the data decides the outcome, such as the tokenizer's fingerprint.

  Raises:
    DataError: no record, or more than 1 % of the records not valid.
  """
  key = f'{INDEX_VERSION} {dataset.source_sha256} {dataset.full_name} {dataset.split} {reader}'
  digest = hashlib.sha256(key.encode()).hexdigest()[:16]
  path = data_dir / 'index' / f'{dataset.full_name.replace("/", "-")}-{digest}.npz'
  index = _load(path)
  if index is None:
    index = _build(dataset, inspect)
    _save(path, index)
  return index


def _build(dataset: Dataset, inspect: Callable[[dict[str, Any]], tuple[int, int]]) -> Index:
  total = len(dataset.records)
  valid, reasons = [], []
  for number in range(total):
    try:
      valid.append((number, *inspect(read_record(dataset, number))))
    except InvalidRecord as error:
      reasons.append(f'record {number}: {error}')
  if len(reasons) > MAX_SKIPPED * total or not valid:
    first = f'; the first is {reasons[0]}' if reasons else ''
    raise DataError(
      f'{len(reasons)} of the {total} records of {dataset.full_name} {dataset.split} are not '
      f'valid, and at most {MAX_SKIPPED:.0%} may be{first}'
    )
  for reason in reasons:
    logging.warning('skipped %s %s %s', dataset.full_name, dataset.split, reason)
  record, length, num_bytes = np.asarray(valid, np.int64).T
  return Index(record, length, int(num_bytes.sum()), len(reasons))


def _load(path: Path) -> Index | None:
  """The cached index; None where there is none that can be read (it is then made again)."""
  try:
    with path.open('rb') as file, np.load(file, allow_pickle=False) as arrays:
      counts = arrays['counts']
      return Index(arrays['record'], arrays['length'], int(counts[0]), int(counts[1]))
  except FileNotFoundError:
    return None
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    logging.warning('the index %s is made again: %s', path, error)
    return None


def _save(path: Path, index: Index) -> None:
  """Writes the cache atomically; a data_dir that cannot be written costs the next run the pass."""
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
      counts = np.asarray([index.num_bytes, index.skipped], np.int64)
      np.savez(file, record=index.record, length=index.length, counts=counts)
    os.replace(file.name, path)
  except OSError as error:
    logging.warning('the index %s cannot be kept: %s', path, error)


class Cache:
  """The most recently used values, up to `limit` bytes of them; safe to use from threads.

  A value is a tuple of arrays; whoever gets one does not write into it.
  """

  def __init__(self, make: Callable[[int], tuple[np.ndarray, ...]], limit: int = 64 * 2**20):
    self._make, self._limit = make, limit
    self._values: collections.OrderedDict[int, tuple[np.ndarray, ...]] = collections.OrderedDict()
    self._bytes = 0
    self._lock = threading.Lock()

  def __getitem__(self, key: int) -> tuple[np.ndarray, ...]:
    with self._lock:
      if key in self._values:
        self._values.move_to_end(key)
        return self._values[key]
    value = self._make(key)
    with self._lock:
      if key not in self._values:
        self._values[key] = value
        self._bytes += _size(value)
      while self._bytes > self._limit and len(self._values) > 1:
        self._bytes -= _size(self._values.popitem(last=False)[1])
    return value


def _size(value: tuple[np.ndarray, ...]) -> int:
  return sum(array.nbytes for array in value)
