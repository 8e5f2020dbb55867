"""The best model for a budget: size, tokens, experts and granularity of least loss under a law."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from moejax.scaling.accounting import Counts
from moejax.scaling.laws import Floats

BYTES = 2  # of a weight, and of an element of the cache: bfloat16
_LEAST_WIDTH, _MOST_WIDTH = 8.0, 2.0**22


@dataclasses.dataclass(frozen=True)
class Budget:
  """What may be spent.

  Attributes:
    flops: of training, and of the inference tokens if there are any.
    memory: bytes of weights and cache while serving; None for no limit.
    inference_tokens: served over the model's life, paid from `flops`.
    cache_tokens: context whose keys and values lie in memory (Ludziejewski et al. 2025, table 2: 16k).
  """

  flops: float | int
  memory: float | int | None = None
  inference_tokens: float | int = 0
  cache_tokens: int = 16384

  def __post_init__(self):
    for key in ('flops', 'memory', 'cache_tokens'):
      value = getattr(self, key)
      if value is not None and not 0 < value < np.inf:
        raise ValueError(f'{key}={value}: accepted is a number more than 0')
    if not 0 <= self.inference_tokens < np.inf:
      raise ValueError(f'inference_tokens={self.inference_tokens}: accepted is a number from 0')


@dataclasses.dataclass(frozen=True)
class Family:
  """Models of every width with the same experts.

  Attributes:
    E, G: expansion rate and granularity.
    count: width -> Counts.
    loss: (N, D) -> loss.
  """

  E: float | int
  G: float | int
  count: Callable[[np.ndarray], Counts]
  loss: Callable[[Floats, Floats], Floats]


@dataclasses.dataclass(frozen=True)
class Choice:
  """The best of one family; `margin` is its loss less that of the best choice of all."""

  E: float | int
  G: float | int
  width: float
  N: float
  active: float
  total: float
  tokens: float
  loss: float
  memory: float
  margin: float = 0.0


def best_of(family: Family, budget: Budget) -> Choice | None:
  """The width of least loss, or None where no model fits the memory or leaves FLOPs to train on.

  A search over the logarithm of the width that refines the best of a grid three times.
  """
  low, high = np.log(_LEAST_WIDTH), np.log(_MOST_WIDTH)
  for _ in range(4):
    grid = np.linspace(low, high, 121)
    counts, tokens, memory, loss = _spend(family, budget, np.exp(grid))
    best = int(np.argmin(loss))
    if not np.isfinite(loss[best]):
      return None
    low, high = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
  size, active, total = (
    float(np.broadcast_to(value, grid.shape)[best])
    for value in (counts.N, counts.active, counts.total)
  )
  return Choice(
    family.E,
    family.G,
    width=float(np.exp(grid[best])),
    N=size,
    active=active,
    total=total,
    tokens=float(tokens[best]),
    loss=float(loss[best]),
    memory=float(memory[best]),
  )


def ranked(families: Iterable[Family], budget: Budget) -> list[Choice]:
  """The best of each family, by loss, each with its margin to the first.

  Raises:
    ValueError: no family has a model within the budget.
  """
  found = [choice for family in families if (choice := best_of(family, budget)) is not None]
  if not found:
    limit = '' if budget.memory is None else f'memory={budget.memory:g} bytes and '
    raise ValueError(
      f'no model of width {_LEAST_WIDTH:.0f} or more fits {limit}flops={budget.flops:g}: '
      'accepted are larger budgets'
    )
  found.sort(key=lambda choice: choice.loss)
  return [dataclasses.replace(choice, margin=choice.loss - found[0].loss) for choice in found]


def _spend(family: Family, budget: Budget, width: np.ndarray):
  """Counts, tokens left to train on, bytes of memory, and loss: infinite where the budget does not reach."""
  counts = family.count(width)
  left = budget.flops - budget.inference_tokens * counts.inference_flops
  tokens = left / counts.training_flops
  memory = BYTES * (counts.stored + budget.cache_tokens * counts.cached)
  possible = tokens >= 1
  if budget.memory is not None:
    possible &= memory <= budget.memory
  loss = family.loss(counts.N, np.maximum(tokens, 1))
  return counts, tokens, memory, np.where(possible, loss, np.inf)
