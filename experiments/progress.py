"""How far a run is and how fast: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from tqdm import tqdm

from experiments.planning.chips import peak_flops

_LINE_SECONDS = 5.0  # plain lines come no faster than this


class Progress:
  """Tells of a run of `steps` updates.

  Only an update whose loss is at hand tells the time of the device: the ones between are still on their way.
  """

  def __init__(
    self,
    steps: int,
    done: int = 0,
    *,
    tokens_per_step: int,
    flops_per_step: float = 0.0,
    device_kind: str = '',
    num_devices: int = 1,
    unit: str = 'tokens',
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
  ):
    """Begins to count the time.

    Args:
      steps: updates of the whole run.
      done: updates that a checkpoint had.
      tokens_per_step: tokens, or images, of a step over all devices.
      flops_per_step: of the model, forward and backward, over all devices, without recomputation; 0: no MFU.
      device_kind, num_devices: of jax.Device; MFU is told where the kind's peak is known.
      unit: what tokens_per_step counts, as it is told.
      stream: where to tell, standard error if not given.
      clock: seconds, for tests.
    """
    self._steps, self._done, self._clock = steps, done, clock
    self._tokens_per_step, self._unit = tokens_per_step, unit
    peak = peak_flops(device_kind) if flops_per_step else None
    self._ideal_seconds = flops_per_step / (peak * num_devices) if peak else None
    self._stream = stream or sys.stderr
    self._bar = (
      tqdm(total=steps, initial=done, unit='step', file=self._stream, dynamic_ncols=True)
      if self._stream.isatty()
      else None
    )
    self._start = self._since = clock()
    self._since_done, self._told = done, -_LINE_SECONDS

  def update(self, done: int, loss: float | None = None) -> dict[str, float]:
    """Notes that `done` updates are done. With a loss, tells it, and returns the times for metrics.jsonl.

    Returns:
      seconds since the beginning, seconds_per_step, tokens_per_second and, where known, mfu; nothing without a loss.
    """
    if self._bar is not None:
      self._bar.update(done - self._done)
    self._done = done
    if loss is None:
      return {}
    now = self._clock()
    seconds = max(now - self._since, 1e-9) / max(1, done - self._since_done)
    times = {
      'seconds': now - self._start,
      'seconds_per_step': seconds,
      'tokens_per_second': self._tokens_per_step / seconds,
    }
    if self._ideal_seconds:
      times['mfu'] = self._ideal_seconds / seconds
    self._since, self._since_done = now, done
    self._tell(loss, times)
    return times

  def note(self, text: str) -> None:
    """A line of its own."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    else:
      print(text, file=self._stream, flush=True)

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in here, such as that of an evaluation, does not count as time of updates."""
    start = self._clock()
    yield
    self._since += self._clock() - start

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _tell(self, loss: float, times: dict[str, float]) -> None:
    speed = f'{_short(times["tokens_per_second"])} {self._unit}/s'
    if 'mfu' in times:
      speed += f', MFU {100 * times["mfu"]:.1f}%'
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {loss:.4f}, {speed}')
      return
    if times['seconds'] - self._told < _LINE_SECONDS and self._done < self._steps:
      return
    self._told = times['seconds']
    left = clock_time((self._steps - self._done) * times['seconds_per_step'])
    self.note(f'step {self._done}/{self._steps}, loss {loss:.4f}, {speed}, {left} left')


@contextlib.contextmanager
def compiling(what: str, stream: TextIO | None = None) -> Iterator[None]:
  """Says 'Compiling <what> ...' before and the seconds it took after, as of the first call of a jitted function."""
  stream = stream or sys.stderr
  print(f'Compiling {what} ...', file=stream, flush=True)
  start = time.monotonic()
  yield
  print(f'Compiled {what} in {time.monotonic() - start:.1f} s', file=stream, flush=True)


def _short(number: float) -> str:
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.3g}{letter}'
  return f'{number:.3g}'


def clock_time(seconds: float) -> str:
  """'1:02:03', '4:05'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'
