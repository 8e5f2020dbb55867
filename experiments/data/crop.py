"""Cutting and scaling images: the central square that evaluation sees, and random crops with flips for training."""

from __future__ import annotations

import importlib
import math

import numpy as np

Box = tuple[int, int, int, int]  # top, left, height, width
AREAS = (0.05, 1.0)  # fractions of the image that a crop may have
ASPECTS = (3 / 4, 4 / 3)  # width over height
ATTEMPTS = 10


def resize(image: np.ndarray, size: int, part: float = 1.0) -> np.ndarray:
  """uint8 [I, J, Q] -> [size, size, Q]: the central square, scaled by Pillow's bilinear filter.

  `part` is that square's side as a fraction of the shorter side: 224 / 256 is what others do by scaling the shorter
  side to 256 and cutting 224 out of the middle.
  """
  height, width, _ = image.shape
  side = max(1, round(part * min(height, width)))
  return scaled(image, ((height - side) // 2, (width - side) // 2, side, side), (size, size))


def inception_crop(
  example: dict[str, np.ndarray], rng: np.random.Generator, shape: tuple[int, int]
) -> dict[str, np.ndarray]:
  """The example with a random part of its image, scaled to `shape`, and mirrored in half of the cases.

  Source: Szegedy et al. 2015, "Going deeper with convolutions", section 6: area even between two fractions of the
  image, aspect between 3/4 and 4/3. The least area is 5 % as in big_vision and vmoe (8 % in the paper); the aspect's
  logarithm is even, so that lying and standing crops are equally likely. Deviations from these codes: there heights are
  even instead of areas, and Pillow's bilinear filter averages where it makes images smaller.
  """
  height, width, _ = example['image'].shape
  image = scaled(example['image'], crop_box(height, width, rng), shape)
  return {**example, 'image': image[:, ::-1] if rng.random() < 0.5 else image}


def crop_box(height: int, width: int, rng: np.random.Generator) -> Box:
  """A random box; the largest central one that has an accepted aspect where no attempt fits the image."""
  for _ in range(ATTEMPTS):
    area = height * width * rng.uniform(*AREAS)
    aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
    tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
    if 0 < tall <= height and 0 < wide <= width:
      return (
        int(rng.integers(height - tall + 1)),
        int(rng.integers(width - wide + 1)),
        tall,
        wide,
      )
  wide = max(1, min(width, int(height * ASPECTS[1])))
  tall = max(1, min(height, int(width / ASPECTS[0])))
  return (height - tall) // 2, (width - wide) // 2, tall, wide


def scaled(image: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
  """uint8 [I, J, Q] -> [*shape, Q]: what is inside the box, by Pillow's bilinear filter."""
  top, left, height, width = box
  inside = image[top : top + height, left : left + width]
  if inside.shape[:2] == shape:
    return inside
  pillow = importlib.import_module('PIL.Image')
  planes = [
    pillow.fromarray(np.ascontiguousarray(inside[..., channel]))
    for channel in range(image.shape[-1])
  ]
  found = [plane.resize(shape[::-1], pillow.Resampling.BILINEAR) for plane in planes]
  return np.stack([np.asarray(plane) for plane in found], axis=-1)
