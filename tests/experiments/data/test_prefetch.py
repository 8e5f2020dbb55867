"""Reading ahead: the same batches, exceptions at their step, and no thread left behind."""

import threading
import time

import numpy as np
import pytest

from experiments.data import prefetch


class Steps:
  """A stream whose batch tells its step; it fails at `fails_at`."""

  def __init__(self, fails_at=None):
    self.fails_at, self.asked = fails_at, []

  def batch(self, step):
    self.asked.append(step)
    if step == self.fails_at:
      raise ValueError(f'step {step} is broken')
    return {'step': np.asarray(step)}


def _prefetch_threads():
  return [thread for thread in threading.enumerate() if thread.name.startswith('prefetch')]


@pytest.mark.parametrize('size', [1, 2, 7, 100])
def test_the_batches_come_in_order_from_one_thread_that_ends(size):
  stream = Steps()
  assert [int(batch['step']) for batch in prefetch(stream, 3, 23, size)] == list(range(3, 23))
  assert stream.asked == list(range(3, 23))
  assert _prefetch_threads() == []


def test_an_empty_range_yields_nothing():
  assert list(prefetch(Steps(), 5, 5)) == []


def test_an_exception_is_raised_at_its_step_and_the_thread_ends():
  batches = prefetch(Steps(fails_at=4), 0, 10)
  assert [int(next(batches)['step']) for _ in range(4)] == [0, 1, 2, 3]
  with pytest.raises(ValueError, match='step 4 is broken'):
    next(batches)
  assert _prefetch_threads() == []


def test_closing_early_ends_the_thread_and_reads_no_further():
  stream = Steps()
  batches = prefetch(stream, 0, 10**9, size=3)
  next(batches)
  assert len(_prefetch_threads()) == 1
  batches.close()
  assert _prefetch_threads() == []
  assert len(stream.asked) <= 5


def test_no_more_than_size_batches_are_read_ahead():
  stream = Steps()
  batches = prefetch(stream, 0, 100, size=2)
  next(batches)
  for _ in range(200):
    if len(stream.asked) == 3:
      break
    time.sleep(0.01)
  time.sleep(0.05)
  assert stream.asked == [0, 1, 2]  # the one given, and two ahead
  batches.close()


def test_a_real_stream_gives_the_same_batches(text_stream):
  stream = text_stream()
  for step, batch in zip(range(7, 12), prefetch(stream, 7, 12), strict=True):
    np.testing.assert_equal(batch, stream.batch(step))


def test_reading_nothing_ahead_is_refused():
  with pytest.raises(ValueError, match='size=0 is not at least 1'):
    prefetch(Steps(), 0, 1, size=0)
