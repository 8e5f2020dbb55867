"""Images by number: checking, resizing, random shifts, and scaling to float32."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from experiments.data.errors import InvalidRecord
from experiments.data.records import Cache, Dataset, Index, read_record
from experiments.errors import BadInput

Shape = tuple[int, int, int]  # I, J, Q
Example = dict[str, np.ndarray]
NORMALIZATIONS = ('signed', 'standard')
MAX_SHIFT = 2  # pixels


def image_task(dataset: Dataset, image_size: int | None) -> tuple[Shape, int]:
  """(image shape, number of classes) of a data set with the features `image` and `label`.

  They are read from the features, else from the builder's metadata; images of differing sizes need
  an `image_size`. Raises BadInput.
  """
  features, metadata = dataset.features, dataset.metadata
  if 'image' not in features or 'label' not in features:
    raise BadInput(
      f'{dataset.full_name} has the features {", ".join(sorted(features))}: '
      "the objective 'classify' needs 'image' and 'label'"
    )
  shape = tuple(metadata.get('image_shape') or features['image'].shape)
  if image_size:
    shape = (image_size, image_size, shape[-1])
  if len(shape) != 3 or None in shape:
    raise BadInput(f'the images of {dataset.full_name} differ in size: give image_size, as in 224')
  num_classes = metadata.get('num_classes') or getattr(features['label'], 'num_classes', None)
  if not num_classes:
    raise BadInput(f'{dataset.full_name} does not tell how many classes its labels have')
  return shape, int(num_classes)


def inspect_image(
  example: dict[str, Any], shape: Shape, num_classes: int, image_size: int | None
) -> tuple[int, int]:
  """(1, 0) for a valid record. Raises InvalidRecord for a wrong shape, type or label."""
  image, label = np.asarray(example['image']), example['label']
  if image.dtype != np.uint8:
    raise InvalidRecord(f'image has dtype {image.dtype}, expected uint8')
  resizable = image.ndim == 3 and image.shape[-1] == shape[-1] and image.size > 0
  if not (resizable if image_size else image.shape == shape):
    raise InvalidRecord(f'image has shape {image.shape}, expected {shape}')
  if not 0 <= label < num_classes:
    raise InvalidRecord(f'label={label} is not from 0 to {num_classes - 1}')
  return 1, 0


class Images:
  """Random access to {'image': uint8 [I, J, Q], 'label': int32 []} of the valid records."""

  def __init__(self, dataset: Dataset, index: Index, image_size: int | None):
    self._dataset, self._index, self._image_size = dataset, index, image_size
    self._examples = Cache(self._read)

  def __len__(self) -> int:
    return len(self._index.record)

  def __getitem__(self, number: int) -> Example:
    image, label = self._examples[number]
    return {'image': image, 'label': label}

  def _read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    example = read_record(self._dataset, int(self._index.record[number]))
    image = example['image']
    if self._image_size:
      image = resize(image, self._image_size)
    return image, np.asarray(example['label'], np.int32)


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """uint8 [I, J, Q] -> [size, size, Q]: the central square, scaled by Pillow's bilinear filter."""
  height, width, channels = image.shape
  if height == width == size:
    return image
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  pillow = importlib.import_module('PIL.Image')
  planes = [
    pillow.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side, channel]))
    for channel in range(channels)
  ]
  scaled = [plane.resize((size, size), pillow.Resampling.BILINEAR) for plane in planes]
  return np.stack([np.asarray(plane) for plane in scaled], axis=-1)


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
