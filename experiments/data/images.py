"""Images by number: checking, labels, random shifts, and scaling to float32."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.data.crop import inception_crop, resize
from experiments.data.errors import InvalidRecord
from experiments.data.records import Cache, Dataset, Index, read_record
from experiments.errors import BadInput

Shape = tuple[int, int, int]  # I, J, Q
Example = dict[str, np.ndarray]
NORMALIZATIONS = ('signed', 'standard')
AUGMENTS = ('shift', 'inception', 'none')
MAX_SHIFT = 2  # pixels
NO_LABEL = -1


def image_task(dataset: Dataset, image_size: int | None) -> tuple[Shape, int]:
  """(image shape, number of classes) of a data set with the features `image` and `label`, or `labels`.

  They are read from the features, else from the builder's metadata; images of differing sizes need
  an `image_size`. Raises BadInput.
  """
  features, metadata = dataset.features, dataset.metadata
  if 'image' not in features or label_feature(features) not in features:
    raise BadInput(
      f'{dataset.full_name} has the features {", ".join(sorted(features))}: '
      "the objective 'classify' needs 'image' and 'label' or 'labels'"
    )
  shape = tuple(metadata.get('image_shape') or features['image'].shape)
  if image_size:
    shape = (image_size, image_size, shape[-1])
  if len(shape) != 3 or None in shape:
    raise BadInput(f'the images of {dataset.full_name} differ in size: give image_size, as in 224')
  label = features[label_feature(features)]
  one = getattr(label, 'feature', label)  # of a sequence of labels
  num_classes = metadata.get('num_classes') or getattr(one, 'num_classes', None)
  if not num_classes:
    raise BadInput(f'{dataset.full_name} does not tell how many classes its labels have')
  return shape, int(num_classes)


def label_feature(features: Any) -> str:
  """'labels', a sequence of them, where there is one and no 'label'."""
  return 'labels' if 'labels' in features and 'label' not in features else 'label'


def inspect_image(
  example: dict[str, Any], shape: Shape, num_classes: int, image_size: int | None
) -> tuple[int, int]:
  """(number of labels, 0) for a valid record. Raises InvalidRecord for a wrong shape, type or label."""
  image, labels = np.asarray(example['image']), np.atleast_1d(example[label_feature(example)])
  if image.dtype != np.uint8:
    raise InvalidRecord(f'image has dtype {image.dtype}, expected uint8')
  resizable = image.ndim == 3 and image.shape[-1] == shape[-1] and image.size > 0
  if not (resizable if image_size else image.shape == shape):
    raise InvalidRecord(f'image has shape {image.shape}, expected {shape}')
  for label in labels:
    if not 0 <= label < num_classes:
      raise InvalidRecord(f'label={label} is not from 0 to {num_classes - 1}')
  return len(labels), 0


class Images:
  """Random access to {'image': uint8 [I, J, Q], 'label': int32 []} of the valid records.

  Where the data set has `labels`, 'label' is int32 [K], K the most that any record has, filled up with NO_LABEL.

  Args:
    index: the valid records.
    fit: what makes the images one size; None leaves them as they are.
  """

  def __init__(
    self, dataset: Dataset, index: Index, fit: Callable[[np.ndarray], np.ndarray] | None
  ):
    self._dataset, self._index, self._fit = dataset, index, fit
    self._feature = label_feature(dataset.features)
    self.num_labels = int(index.length.max(initial=1)) if self._feature == 'labels' else None
    self._examples = Cache(self._read)

  def __len__(self) -> int:
    return len(self._index.record)

  def __getitem__(self, number: int) -> Example:
    image, label = self._examples[number]
    return {'image': image, 'label': label}

  def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    example = read_record(self._dataset, int(self._index.record[number]))
    image, label = example['image'], np.asarray(example[self._feature], np.int32)
    if self.num_labels:
      label = np.pad(label, (0, self.num_labels - len(label)), constant_values=NO_LABEL)
    return image if self._fit is None else self._fit(image), label


def preparation(
  shape: Shape, image_size: int | None, augment: str, eval_crop: float, train: bool
) -> tuple[Callable[[np.ndarray], np.ndarray] | None, Callable[..., Example] | None]:
  """(what makes images one size when they are read, what is drawn anew for each use); None for nothing.

  Raises:
    BadInput: an unknown `augment`, or a part of images that are neither square nor given a size.
  """
  if augment not in AUGMENTS:
    raise BadInput(f'augment={augment!r} is not one of {", ".join(AUGMENTS)}')
  if train and augment == 'inception':
    return None, functools.partial(inception_crop, shape=shape[:2])
  part = 1.0 if train else eval_crop
  if part < 1 and shape[0] != shape[1]:
    raise BadInput(f'eval_crop={eval_crop} of images of shape {shape}: give image_size, as in 224')
  side = image_size or (shape[0] if part < 1 else None)
  fit = functools.partial(resize, size=side, part=part) if side else None
  return fit, shift if train and augment == 'shift' else None


def shift(example: Example, rng: np.random.Generator) -> Example:
  """Moves the image by up to MAX_SHIFT pixels in each direction; what is uncovered becomes 0."""
  image = example['image']
  height, width, channels = image.shape
  padded = np.zeros((height + 2 * MAX_SHIFT, width + 2 * MAX_SHIFT, channels), image.dtype)
  padded[MAX_SHIFT:-MAX_SHIFT, MAX_SHIFT:-MAX_SHIFT] = image
  top, left = rng.integers(0, 2 * MAX_SHIFT + 1, size=2)
  return {**example, 'image': padded[top : top + height, left : left + width]}


def to_float(example: Example, normalization: str) -> Example:
  """uint8 -> float32: 'signed' maps 0..255 to [-1, 1], 'standard' gives mean 0 and deviation 1.

  'standard' is per image over all pixels and channels; the deviation is taken as at least
  1 / sqrt(pixels), so that a uniform image becomes 0.
  """
  image = example['image'].astype(np.float32)
  if normalization == 'signed':
    image = image / np.float32(127.5) - np.float32(1)
  else:
    deviation = np.maximum(image.std(), np.float32(image.size**-0.5))
    image = (image - image.mean()) / deviation
  return {**example, 'image': image}
