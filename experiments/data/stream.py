"""One face for all data: `make_stream(name, ...)` and `stream.batch(step)`.

A batch is a pure function of the seed and the step: resuming needs the step and nothing else, and
the fingerprint says whether it is the same stream. Batch s consists of the items s*B .. s*B+B-1 of
an endless sequence, of which each process takes its consecutive share: any number of processes
reads the same global batches in the same order. In training the sequence is one grain permutation
of all records (or windows) after another, a new one each epoch, and a batch may lie across two
epochs. In evaluation it is one pass in the source's order.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.data.images import (
  NORMALIZATIONS,
  Images,
  Shape,
  image_task,
  inspect_image,
  preparation,
  to_float,
)
from experiments.data.records import Dataset, load_index
from experiments.data.text import Window, Windows, inspect_text, mask_tokens, text_feature
from experiments.data.tokenizers import Tokenizer, make_tokenizer
from experiments.errors import BadInput

Objective = Literal['causal', 'masked', 'classify']
OBJECTIVES = ('causal', 'masked', 'classify')
# How grain and NumPy turn seeds into orders, masks and shifts; a test holds golden values of it.
RANDOMNESS = 'grain-index-shuffle-1 numpy-philox-1'
_SHUFFLE_SEED, _ITEM_SEED = 0, 1  # independent sub-seeds of the stream's seed


@dataclasses.dataclass(frozen=True)
class Content:
  """What a stream reads: items by number, what is done to each, and what a model must know."""

  items: Any  # __len__ and __getitem__ -> dict of arrays
  skipped: int
  fingerprint: dict[str, Any]  # its part of the stream's
  random_map: Callable[..., dict[str, np.ndarray]] | None = None  # (item, rng)
  map: Callable[..., dict[str, np.ndarray]] | None = None  # (item), after random_map
  tokenizer: Tokenizer | None = None
  image_shape: Shape | None = None
  num_classes: int | None = None
  num_labels: int | None = None
  num_bytes: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
  """Batches by step; made by `make_stream`.

  fingerprint: a flat dict that JSON can hold, equal for equal streams on any number of processes.
  num_records: images, or windows of text, in one pass. skipped: records that are not valid.
  """

  fingerprint: dict[str, Any]
  batch_size: int
  num_records: int
  train: bool
  process_index: int
  process_count: int
  content: Content
  dataset: Any  # grain.MapDataset

  @property
  def num_batches(self) -> int:
    """Batches in one pass; the last may be short: it is filled from the next epoch, or padded."""
    return -(-self.num_records // self.batch_size)

  @property
  def vocab_size(self) -> int | None:
    """Ids of the tokenizer with its specials; None for images."""
    return self.tokenizer.vocab_size if self.tokenizer else None

  @property
  def tokenizer(self) -> Tokenizer | None:
    return self.content.tokenizer

  @property
  def image_shape(self) -> Shape | None:
    """(I, J, Q); None for text."""
    return self.content.image_shape

  @property
  def num_classes(self) -> int | None:
    return self.content.num_classes

  @property
  def num_labels(self) -> int | None:
    """K, the most labels of an image; None where each has exactly one, and for text."""
    return self.content.num_labels

  @property
  def num_bytes(self) -> int | None:
    """Bytes of text in one pass, for bits per byte; None for images."""
    return self.content.num_bytes

  @property
  def skipped(self) -> int:
    return self.content.skipped

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """This process's share of batch `step`, each array [batch_size / process_count, ...].

    Text: tokens, targets, segment_ids, positions int32 and loss_mask bool, all [B, S]. Images:
    image float32 [B, I, J, Q], label int32 [B] (or [B, K], see `Images`). Evaluation adds `valid` bool [B], False for
    the rows that fill the last batch, padding that no router sees: they repeat the last item, text with loss_mask False
    and segment_ids 0.

    Raises:
      IndexError: negative step, or in evaluation a step past the end of the pass.
    """
    if step < 0 or (not self.train and step >= self.num_batches):
      end = '' if self.train else f' and less than num_batches={self.num_batches}'
      raise IndexError(f'step={step} is not at least 0{end}')
    share = self.batch_size // self.process_count
    first = step * self.batch_size + self.process_index * share
    numbers = np.arange(first, first + share)
    valid = numbers < self.num_records
    if not self.train:
      numbers = np.minimum(numbers, self.num_records - 1)
    items = [self.dataset[int(number)] for number in numbers]
    batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
    if not self.train:
      batch['valid'] = valid
      if 'loss_mask' in batch:
        batch['loss_mask'] &= valid[:, None]
        batch['segment_ids'] *= valid[:, None]
    return batch


def make_stream(
  name: str,
  *,
  split: str,
  objective: Objective,
  batch_size: int,
  seed: int,
  sequence_length: int | None = None,
  tokenizer: str = 'bytes',
  mask_rate: float = 0.15,
  data_dir: str | os.PathLike[str] | None = None,
  process_index: int = 0,
  process_count: int = 1,
  train: bool = True,
  image_size: int | None = None,
  normalization: str = 'signed',
  augment: str = 'shift',
  eval_crop: float = 1.0,
) -> Stream:
  """The stream of one split of a data set.

  Args:
    name: 'wiki6' or 'mnist5k' (prepared at the first use), or a prepared TFDS data set.
    split: a TFDS split or slice, such as 'train' or 'train[:10%]'.
    objective: 'causal' or 'masked' for text, 'classify' for images.
    batch_size: of all processes together.
    seed: of order, masking and augmentation; streams of different seeds are unrelated.
    sequence_length: tokens in a window; text only.
    tokenizer: see tokenizers.py; text only.
    mask_rate: fraction of the positions to predict; 'masked' only.
    data_dir: prepared data; default the environment's MOEJAX_DATA, else ~/.cache/moejax/data.
    train: shuffled anew each epoch, endless, images augmented; else one pass in order.
    image_size: crop to the central square and scale to this side; images only.
    normalization: 'signed' ([-1, 1]) or 'standard' (mean 0, deviation 1 per image); images only.
    augment: of training images: 'shift' by up to two pixels, 'inception' crops and flips, 'none'.
    eval_crop: side of the central square that evaluation sees, as a part of the shorter side.

  Raises:
    BadInput: an argument that cannot be served.
    DataError: damaged data, or too many invalid records.
  """
  _check(objective, batch_size, seed, process_index, process_count)
  # TFDS and grain are slow to import: a program that opens no stream does not pay for them
  from experiments.data.catalog import open_dataset, resolve_data_dir

  dataset, index_dir = open_dataset(name, split, data_dir), resolve_data_dir(data_dir)
  if objective == 'classify':
    content = _open_images(dataset, index_dir, image_size, normalization, augment, eval_crop, train)
  else:
    rate = mask_rate if objective == 'masked' else None
    content = _open_text(dataset, index_dir, tokenizer, sequence_length, rate, train)
  fingerprint = {
    'dataset': dataset.full_name,
    'split': split,
    'source_sha256': dataset.source_sha256,
    'objective': objective,
    'batch_size': batch_size,
    'seed': seed,
    'train': train,
    'randomness': RANDOMNESS,
    **content.fingerprint,
  }
  return Stream(
    fingerprint=fingerprint,
    batch_size=batch_size,
    num_records=len(content.items),
    train=train,
    process_index=process_index,
    process_count=process_count,
    content=content,
    dataset=_pipeline(content, seed, train),
  )


def _pipeline(content: Content, seed: int, train: bool) -> Any:
  """The grain data set of finished items: endless in training."""
  import grain

  items = grain.MapDataset.source(content.items)
  if train:
    items = items.shuffle(seed=_sub_seed(seed, _SHUFFLE_SEED)).repeat()
  if content.random_map:
    items = items.random_map(content.random_map, seed=_sub_seed(seed, _ITEM_SEED))
  return items.map(content.map) if content.map else items


def _open_images(
  dataset: Dataset,
  index_dir: Path,
  image_size: int | None,
  normalization: str,
  augment: str,
  eval_crop: float,
  train: bool,
) -> Content:
  if normalization not in NORMALIZATIONS:
    raise BadInput(f'normalization={normalization!r} is not one of {", ".join(NORMALIZATIONS)}')
  shape, num_classes = image_task(dataset, image_size)
  inspect = functools.partial(
    inspect_image, shape=shape, num_classes=num_classes, image_size=image_size
  )
  fit, random_map = preparation(shape, image_size, augment, eval_crop, train)
  index = load_index(dataset, inspect, f'{shape} {num_classes} {bool(image_size)}', index_dir)
  # settings that came later are told where they matter: runs from before go on
  changed: dict[str, Any] = {'augment': augment} if train and augment != 'shift' else {}
  changed |= {'eval_crop': eval_crop} if eval_crop < 1 and not train else {}
  items = Images(dataset, index, fit)
  return Content(
    items=items,
    skipped=index.skipped,
    fingerprint={'image_shape': list(shape), 'normalization': normalization, **changed},
    random_map=random_map,
    map=functools.partial(to_float, normalization=normalization),
    image_shape=shape,
    num_classes=num_classes,
    num_labels=items.num_labels,
  )


def _open_text(
  dataset: Dataset,
  index_dir: Path,
  spec: str,
  length: int | None,
  mask_rate: float | None,
  train: bool,
) -> Content:
  """Windows for a causal model, or with a `mask_rate` for a masked one."""
  if length is None or length < 1:
    raise BadInput(f'sequence_length={length} is not at least 1')
  if mask_rate is not None and not 0 < mask_rate <= 1:
    raise BadInput(f'mask_rate={mask_rate} is not more than 0 and at most 1')
  tokenizer, feature = make_tokenizer(spec, mask=mask_rate is not None), text_feature(dataset)
  inspect = functools.partial(inspect_text, feature=feature, tokenizer=tokenizer)
  index = load_index(dataset, inspect, f'{feature} {tokenizer.fingerprint}', index_dir)
  causal = mask_rate is None
  windows = Windows(dataset, feature, index, tokenizer, length, causal=causal, pad=not train)
  if not len(windows):
    raise BadInput(
      f'sequence_length={length} is more than the {windows.num_tokens} tokens of '
      f'{dataset.full_name} {dataset.split}'
    )
  return Content(
    items=windows,
    skipped=index.skipped,
    fingerprint={'sequence_length': length, 'tokenizer': tokenizer.fingerprint}
    | ({} if mask_rate is None else {'mask_rate': mask_rate}),
    random_map=None if mask_rate is None else _masking(tokenizer, mask_rate),
    tokenizer=tokenizer,
    num_bytes=index.num_bytes,
  )


def _masking(tokenizer: Tokenizer, mask_rate: float) -> Callable[..., Window]:
  assert tokenizer.mask_id is not None  # make_tokenizer was asked for one
  return functools.partial(
    mask_tokens,
    mask_id=tokenizer.mask_id,
    num_ordinary=tokenizer.num_ordinary,
    mask_rate=mask_rate,
  )


def _sub_seed(seed: int, purpose: int) -> int:
  """A 32-bit seed. Hashed, for grain shuffles epoch e of seed s as epoch 0 of seed s + e."""
  return int(np.random.SeedSequence([seed, purpose]).generate_state(1)[0])


def _check(
  objective: str, batch_size: int, seed: int, process_index: int, process_count: int
) -> None:
  """Raises BadInput for arguments that no data set can serve."""
  if objective not in OBJECTIVES:
    raise BadInput(f'objective={objective!r} is not one of {", ".join(OBJECTIVES)}')
  if seed < 0:
    raise BadInput(f'seed={seed} is not 0 or more')
  if not 0 <= process_index < process_count:
    raise BadInput(f'process_index={process_index} is not from 0 to {process_count - 1}')
  if batch_size < 1 or batch_size % process_count:
    raise BadInput(f'batch_size={batch_size} is not a multiple of process_count={process_count}')
