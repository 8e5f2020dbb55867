"""TFDS builders of the embedded data sets, and preparing them once: no TensorFlow, no network.

The features are Text, Tensor and ClassLabel only, in array_record files: TFDS reads and writes
these with NumPy alone. Records keep the order of the source.
"""

from __future__ import annotations

import abc
import contextlib
import fcntl
import io
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from experiments.data import sources
from experiments.errors import DataError, StorageError

_PAGE = re.compile(rb'^  <page>\n', re.MULTILINE)
_TRAIN_END, _VALIDATION_END = 0.90, 0.95  # fractions of the bytes of wiki6
_IMAGE_SHAPE, _NUM_CLASSES, _TEST_EVERY = (28, 28, 1), 10, 5


class OrderedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """A builder whose records keep their order and whose metadata holds the sha256 of the source.

  A subclass names its VERSION, SOURCE_SHA256 and DESCRIPTION and defines `features` and `splits`;
  `METADATA` may add `image_shape` and `num_classes` where the features do not tell them.
  """

  SOURCE_SHA256: str
  DESCRIPTION: str
  METADATA: Mapping[str, Any] = {}
  # Without it TFDS 4.9.10 looks for a checksum file with importlib_resources, which it does not
  # declare (tensorflow/datasets issue 11212); nothing is downloaded, so there are no checksums.
  code_path = None

  @abc.abstractmethod
  def features(self) -> dict[str, Any]:
    """The TFDS features by name."""

  @abc.abstractmethod
  def splits(self) -> Mapping[str, Iterable[dict[str, Any]]]:
    """The examples of every split, in order."""

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.DESCRIPTION,
      features=tfds.features.FeaturesDict(self.features()),
      metadata=tfds.core.MetadataDict(source_sha256=self.SOURCE_SHA256, **self.METADATA),
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    del dl_manager  # nothing is downloaded
    return {name: self._generate_examples(split) for name, split in self.splits().items()}

  def _generate_examples(
    self, split: Iterable[dict[str, Any]]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    yield from enumerate(split)


class Wiki6(OrderedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """One record a Wikipedia page; joined in order, the records of all splits are the source file.

  A document lies in the split in which its first byte lies: the first 90 % of the bytes are train,
  the next 5 % validation, the last 5 % test, and a document cut by a boundary goes to the earlier.
  """

  VERSION = tfds.core.Version('1.0.0')
  SOURCE_SHA256 = sources.WIKI6.sha256
  DESCRIPTION = '6.09 MB of an English Wikipedia XML dump.'

  def features(self) -> dict[str, Any]:
    return {'text': tfds.features.Text(), 'index': tfds.features.Scalar(np.int64)}

  def splits(self) -> dict[str, list[dict[str, Any]]]:
    text = sources.read(sources.WIKI6)
    starts = _document_starts(text)
    parts: dict[str, list[dict[str, Any]]] = {'train': [], 'validation': [], 'test': []}
    for index, (start, stop) in enumerate(zip(starts, [*starts[1:], len(text)], strict=True)):
      parts[_split_at(start / len(text))].append({'text': text[start:stop], 'index': index})
    return parts


def _document_starts(text: bytes) -> list[int]:
  """Offsets of the pages; the dump's header belongs to the first, its closing tag to the last."""
  return [0] + [match.start() for match in _PAGE.finditer(text)][1:]


def _split_at(fraction: float) -> str:
  if fraction < _TRAIN_END:
    return 'train'
  return 'validation' if fraction < _VALIDATION_END else 'test'


class Mnist5k(OrderedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """5,000 MNIST images, sorted by class in the file: every fifth, from the first, is a test image.

  So each class has 400 training and 100 test images.
  """

  VERSION = tfds.core.Version('1.0.0')
  SOURCE_SHA256 = sources.MNIST5K.sha256
  DESCRIPTION = '5,000 MNIST images, 500 of each class.'

  def features(self) -> dict[str, Any]:
    return {
      'image': tfds.features.Tensor(shape=_IMAGE_SHAPE, dtype=np.uint8),
      'label': tfds.features.ClassLabel(num_classes=_NUM_CLASSES),
    }

  def splits(self) -> dict[str, list[dict[str, Any]]]:
    csv = sources.read(sources.MNIST5K).decode('ascii').replace('\n', ',')
    columns = int(np.prod(_IMAGE_SHAPE)) + 1  # the pixels, then the class
    rows = np.fromstring(csv, dtype=np.int64, sep=',').reshape(-1, columns)
    examples = [
      {'image': row[:-1].reshape(_IMAGE_SHAPE).astype(np.uint8), 'label': int(row[-1])}
      for row in rows
    ]
    test = examples[::_TEST_EVERY]
    train = [example for index, example in enumerate(examples) if index % _TEST_EVERY]
    return {'train': train, 'test': test}


EMBEDDED: dict[str, type[OrderedBuilder]] = {'wiki6': Wiki6, 'mnist5k': Mnist5k}


def prepare(builder_cls: type[OrderedBuilder], data_dir: Path) -> tfds.core.DatasetBuilder:
  """The prepared data set, made at the first call; safe when several processes call at once.

  A file lock lets one process prepare while the others wait; TFDS writes into a temporary folder
  and renames it, so a process killed in the middle leaves nothing that counts as prepared.

  Raises:
    DataError: the folder holds a data set made from other bytes.
    StorageError: the folder cannot be written.
  """
  builder = builder_cls(data_dir=data_dir, file_format='array_record')
  if not builder.data_path.exists():
    try:
      data_dir.mkdir(parents=True, exist_ok=True)
      with _lock(data_dir / f'.{builder.name}.lock'):
        _generate(builder)
    except OSError as error:
      why = error.strerror or error
      raise StorageError(f'data_dir={data_dir} cannot be written: {why}') from error
  prepared = tfds.core.read_only_builder.builder_from_directory(builder.data_dir)
  found = (prepared.info.metadata or {}).get('source_sha256')
  if found != builder_cls.SOURCE_SHA256:
    raise DataError(
      f'{builder.data_dir} was prepared from a source with sha256={found}, and this code expects '
      f'{builder_cls.SOURCE_SHA256}: remove that folder, or name another data_dir'
    )
  return prepared


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
  """Holds an exclusive lock on `path`; the system releases it when the process dies."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _generate(builder: tfds.core.DatasetBuilder) -> None:
  """Writes the data set, unless another process did while this one waited for the lock."""
  if builder.data_path.exists():
    return
  logging.info('preparing %s in %s', builder.name, builder.data_dir)
  tfds.disable_progress_bar()
  with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_dir=scratch,
      download_config=tfds.download.DownloadConfig(try_download_gcs=False),
    )
