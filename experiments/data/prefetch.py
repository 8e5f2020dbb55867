"""Reading batches ahead of the training step, on one background thread."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class HasBatch(Protocol):
  """Anything with a pure `batch(step)`."""

  def batch(self, step: int) -> Batch: ...


def prefetch(
  stream: HasBatch, first_step: int, last_step: int, size: int = 2
) -> Generator[Batch, None, None]:
  """Yields the batches of steps first_step, ..., last_step - 1, up to `size` of them read ahead.

  An exception in `stream.batch` is raised at its step. Closing the iterator, or dropping it, ends
  the thread after the batch that it is reading.
  """
  if size < 1:
    raise ValueError(f'size={size} is not at least 1')
  return _prefetch(stream, range(first_step, last_step), size)


def _prefetch(stream: HasBatch, steps: range, size: int) -> Generator[Batch, None, None]:
  ahead: collections.deque[Future[Batch]] = collections.deque()
  remaining = iter(steps)
  with ThreadPoolExecutor(1, thread_name_prefix='prefetch') as pool:
    try:
      for step in itertools.islice(remaining, size):
        ahead.append(pool.submit(stream.batch, step))
      while ahead:
        batch = ahead.popleft().result()
        for step in itertools.islice(remaining, 1):
          ahead.append(pool.submit(stream.batch, step))
        yield batch
    finally:
      for future in ahead:
        future.cancel()
