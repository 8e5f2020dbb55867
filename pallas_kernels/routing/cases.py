"""Inputs that every body of the routing metadata must get right."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackCase:
  """The expert of each row; `num_experts` and above mean dropped."""

  name: str
  num_experts: int
  expert: tuple[int, ...]


@dataclass(frozen=True)
class TopKCase:
  """Logits `[T, E]` of which `k` are taken."""

  name: str
  k: int
  logits: np.ndarray


def _shuffled(*sizes: int) -> tuple[int, ...]:
  """`sizes[e]` rows for expert e; the last size is of dropped rows."""
  rows = np.repeat(np.arange(len(sizes)), sizes)
  return tuple(np.random.default_rng(0).permutation(rows).tolist())


# 300 rows: no multiple of a block.
PACK_CASES = (
  PackCase('balanced', 4, tuple(row % 4 for row in range(300))),
  PackCase('uneven, some dropped', 4, _shuffled(120, 3, 100, 37, 40)),
  PackCase('empty experts at both ends', 4, _shuffled(0, 150, 150, 0, 0)),
  PackCase('one hot expert', 4, (2,) * 300),
  PackCase('all dropped', 4, (4,) * 300),
  PackCase('beyond the number of experts is dropped', 4, (9, 2, 4, 2) * 75),
  PackCase('one row', 8, (5,)),
  PackCase('one expert', 1, _shuffled(20, 13)),
  PackCase('more experts than are counted', 200, tuple(row * 7 % 200 for row in range(300))),
)


def _logits(seed: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _with(logits: np.ndarray, *places) -> np.ndarray:
  for row, columns, value in places:
    logits[row, columns] = value
  return logits


NAN, INF = np.float32('nan'), np.float32('inf')
TOP_K_CASES = (
  TopKCase('distinct logits', 3, _logits(0, 300, 16)),
  TopKCase('many ties', 3, np.round(_logits(1, 300, 16))),
  TopKCase('all equal', 3, np.zeros((300, 16), np.float32)),
  TopKCase('zeros of both signs tie', 3, np.tile(np.array([[-0.0, 0.0]], np.float32), (300, 8))),
  TopKCase('one choice', 1, _logits(2, 40, 5)),
  TopKCase('every expert', 5, _logits(3, 40, 5)),
  TopKCase(
    'infinities and NaNs of both signs',
    3,
    _with(
      _logits(4, 300, 16),
      (0, [3, 9], -INF),
      (1, slice(0, 14), -INF),
      (2, slice(None), -INF),
      (3, 5, NAN),
      (4, [2, 11], -NAN),
      (5, [2, 3], INF),
      (6, [7, 12], [INF, NAN]),
    ),
  ),
)
