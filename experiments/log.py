"""What a run tells while it runs: metrics.jsonl always, TensorBoard beside it.

metrics.jsonl has one JSON object a line. `step` counts updates from 0: the line of step s tells of update s, so a
checkpoint of step N (N updates done) is followed by line N. Everything that depends on the clock stands under `time`;
the rest is a function of the config, so a run that was killed and resumed leaves the same lines as one that was not.
Numbers that are not finite are null.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from experiments.errors import StorageError
from experiments.settings import LogSettings
from experiments.workdir import write_text


class Writer(Protocol):
  """Where metrics go: scalars, vectors a layer `[L]`, tables `[L, E]`."""

  def write(
    self, step: int, metrics: Mapping[str, Any], timed: Mapping[str, float] | None = None
  ) -> None: ...

  def close(self) -> None: ...


def make_writer(workdir: Path, log: LogSettings, restored_step: int = 0) -> Writer:
  """The writers of a run that goes on at `restored_step` (0: from the start)."""
  writers: list[Writer] = [JsonLines(workdir / 'metrics.jsonl', restored_step)]
  if log.tensorboard:
    writers.append(TensorBoard(workdir / 'tensorboard', restored_step))
  return _All(writers)


def no_writer(workdir: Path, log: LogSettings, restored_step: int = 0) -> Writer:
  """Writes nothing: of several processes only the first tells."""
  return _All([])


class JsonLines:
  """metrics.jsonl, where every step stands exactly once."""

  def __init__(self, file: Path, restored_step: int = 0):
    """Opens `file` for steps from `restored_step` on; later ones, which will be done again, are removed."""
    self.file = file
    kept = {line['step']: text for text, line in _parsed(file) if line['step'] < restored_step}
    if file.exists():
      write_text(file, ''.join(f'{kept[step]}\n' for step in sorted(kept)))
    try:
      self._stream = file.open('a', encoding='utf-8')
    except OSError as error:
      raise StorageError(f'{file} cannot be written: {error.strerror}') from error

  def write(
    self, step: int, metrics: Mapping[str, Any], timed: Mapping[str, float] | None = None
  ) -> None:
    """Appends a line; it is in the file when this returns.

    Raises:
      StorageError: the disk is full or gone.
    """
    line = {'step': int(step)} | {name: _plain(value) for name, value in metrics.items()}
    if timed:
      line['time'] = {name: _plain(value) for name, value in timed.items()}
    try:
      self._stream.write(json.dumps(line, allow_nan=False) + '\n')
      self._stream.flush()
    except OSError as error:
      with contextlib.suppress(OSError):  # what is left in its buffer cannot be written either
        self._stream.close()
      raise StorageError(f'{self.file} cannot be written: {error.strerror}') from error

  def close(self) -> None:
    self._stream.close()


class TensorBoard:
  """Scalars and vectors of layers as TensorBoard events; its failures are told once and stop nothing.

  Events are written by this thread: tensorboardX's own SummaryWriter hands them to another, and once that has died
  of a full disk the next write waits for ever.
  """

  def __init__(self, folder: Path, restored_step: int = 0):
    self._folder, self._broken = folder, False
    self._events: Any = None  # until it is opened
    self._guard(lambda: self._open(restored_step))

  def write(
    self, step: int, metrics: Mapping[str, Any], timed: Mapping[str, float] | None = None
  ) -> None:
    clock = {f'time/{name}': value for name, value in (timed or {}).items()}
    self._guard(lambda: self._write(step, {**metrics, **clock}))

  def close(self) -> None:
    self._guard(lambda: self._events.close())

  def _open(self, restored_step: int) -> None:
    # slow to import, and not needed by every run
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._folder.mkdir(parents=True, exist_ok=True)
    self._events = EventsWriter(str(self._folder / 'events'))
    if restored_step:  # readers drop what an earlier attempt wrote of later steps
      start = SessionLog(status=SessionLog.START)
      self._add(Event(step=restored_step, session_log=start))

  def _write(self, step: int, metrics: Mapping[str, Any]) -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.summary import scalar

    for name, value in metrics.items():
      array = np.asarray(value)
      if array.ndim > 1 or array.dtype.kind in 'USO':
        continue  # tables are for the report
      one = array.ndim == 0
      for index, number in enumerate(array.reshape(-1)):
        tag = name if one else f'{name}/{index}'
        self._add(Event(step=step, summary=scalar(tag, float(number))))
    self._events.flush()

  def _add(self, event: Any) -> None:
    event.wall_time = time.time()
    self._events.write_event(event)

  def _guard(self, act: Callable[[], None]) -> None:
    if self._broken:
      return
    try:
      act()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # it is only a view of the run
      self._broken = True
      with contextlib.suppress(AttributeError, OSError, ValueError):  # not open, or still broken
        self._events.close()
      print(f'TensorBoard in {self._folder} is off from here on: {error}', file=sys.stderr)


class _All:
  """Several writers as one."""

  def __init__(self, writers: list[Writer]):
    self._writers = writers

  def write(
    self, step: int, metrics: Mapping[str, Any], timed: Mapping[str, float] | None = None
  ) -> None:
    for writer in self._writers:
      writer.write(step, metrics, timed)

  def close(self) -> None:
    for writer in self._writers:
      writer.close()


def read_lines(file: Path, convert: Callable[[Any], Any] | None = None) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl by step; none where there is no file.

  Of a line that was cut short, as by a crash, nothing is left; of two with one step the last counts.

  Args:
    file: the metrics.jsonl.
    convert: makes something smaller of each value as it is read, such as an array of a long table.

  Raises:
    StorageError: the file is there and cannot be read.
  """
  lines = {}
  for _, line in _parsed(file):
    lines[line['step']] = {key: convert(one) for key, one in line.items()} if convert else line
  return [lines[step] for step in sorted(lines)]


def _parsed(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Each whole line as text and as an object with a step."""
  if not file.exists():
    return
  try:
    with file.open(encoding='utf-8', errors='replace') as stream:
      for text in stream:
        with contextlib.suppress(ValueError):
          line = json.loads(text)
          if isinstance(line, dict) and isinstance(line.get('step'), int):
            yield text.rstrip('\n'), line
  except OSError as error:
    raise StorageError(f'{file} cannot be read: {error.strerror}') from error


def _plain(value: Any) -> Any:
  """A JSON value of a number, a str or an array; float32 with no more digits than it has."""
  if isinstance(value, str):
    return value
  array = np.asarray(value)
  if array.ndim:
    return [_plain(one) for one in array]
  if array.dtype.kind in 'biu':
    return array.item()
  number = float(array) if array.dtype == np.float64 else float(str(array.astype(np.float32)))
  return number if math.isfinite(number) else None
