"""The folder of a run: chosen or made, locked, and never shared by two different experiments.

DIR/config.json     the resolved config, sorted
DIR/lock            host, boot and process id of the run that writes here
DIR/metrics.jsonl   (log.py)   DIR/checkpoints/ (checkpoint.py)   DIR/report.html (report.py)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.errors import BadInput, StorageError
from experiments.later import with_later

# What may change between two resumes of one run: neither the shape nor the meaning of the saved state hangs on it.
# microbatches and mesh only change the order of additions; the learning rate is a function of the step, so that a
# run may be prolonged or cooled down; data_dir may have moved (the data's fingerprint is checked apart).
MAY_CHANGE = (
  'steps',
  'microbatches',
  'allow_leak',
  'profile',
  'compiler',
  'data.eval_crop',
  'data.data_dir',
  'data.allow_changed_stream',
  'optim.schedule',
  'optim.learning_rate',
  'optim.warmup_steps',
  'optim.cooldown_steps',
  'optim.timescale',
  'optim.final_fraction',
  'optim.weight_decay',
  'optim.decay_of',
  'model.dtype',
  'model.remat',
  'model.unroll',
  'model.moe.dispatch',
  'model.moe.implementation',
  'model.moe.exchange',
  'model.moe.exchange_options',
  'mesh',
  'eval',
  'checkpoint',
  'log',
)


def fresh(config_name: str) -> Path:
  """runs/<config name>-<date-time>, not made yet."""
  name = re.sub(r'[^A-Za-z0-9._-]+', '-', config_name)[:60]
  return Path('runs') / f'{name}-{time.strftime("%Y%m%d-%H%M%S")}'


def config_name(workdir: Path) -> str:
  """The name of a folder without date and time, where it has them."""
  return re.sub(r'-\d{8}-\d{6}$', '', workdir.name)


def config_path(workdir: Path) -> Path:
  return workdir / 'config.json'


def read_json(file: Path) -> dict[str, Any]:
  """A JSON object.

  Raises:
    BadInput: the file is no JSON object.
  """
  try:
    values = json.loads(file.read_text())
  except OSError as error:
    raise BadInput(f'{file} cannot be read: {error.strerror}') from error
  except ValueError as error:
    raise BadInput(f'{file} cannot be read as JSON: {error}') from error
  if not isinstance(values, dict):
    raise BadInput(f'{file} holds a {type(values).__name__}, and a config must be an object')
  return values


def make_folder(folder: Path, flag: str) -> Path:
  """Makes a folder that this flag of a program names.

  Raises:
    StorageError: it cannot be made.
  """
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise StorageError(f'{flag}={folder} cannot be made: {error.strerror}') from error
  return folder


def write_text(file: Path, text: str) -> None:
  """Replaces a file at once: a reader, or a crash, sees the old text or the new, never a part.

  Raises:
    StorageError: the file cannot be written.
  """
  temporary = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('w', encoding='utf-8') as stream:
      stream.write(text)
      stream.flush()
      os.fsync(stream.fileno())
    temporary.replace(file)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink()
    raise StorageError(f'{file} cannot be written: {error.strerror}') from error


def check(workdir: Path, config: Mapping[str, Any]) -> None:
  """Raises what `opened` would, and leaves nothing behind: for before work that a bad folder would make vain."""
  there = workdir.absolute()
  while not os.path.lexists(there):
    there = there.parent
  try:
    with tempfile.TemporaryFile(dir=there):
      pass
    lock = os.open(workdir / 'lock', os.O_RDWR) if (workdir / 'lock').exists() else None
  except OSError as error:
    raise _unwritable(workdir, error) from error
  if lock is not None:
    try:
      _lock(workdir, lock)
    finally:
      os.close(lock)
  _changes(workdir, config)


@contextlib.contextmanager
def opened(workdir: Path, config: Mapping[str, Any]) -> Iterator[Path]:
  """The run's folder, made and locked for as long as the `with` block lasts; its config.json is as it was.

  In a run of several processes only the first enters it.

  Raises:
    BadInput: another run writes here, or the folder belongs to another experiment.
    StorageError: the folder cannot be made or written.
  """
  with locked(workdir):
    _changes(workdir, config)
    yield workdir


def write_config(workdir: Path, config: Mapping[str, Any]) -> None:
  """Writes config.json, after a line on stderr for each setting that a resume changes.

  For when nothing can refuse them any more: a run that does not go on keeps the settings it was made with.

  Raises:
    BadInput, StorageError: as `opened`.
  """
  for line in _changes(workdir, config):
    print(line, file=sys.stderr)
  text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
  write_text(config_path(workdir), text + '\n')


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Path]:
  """The folder, made, and nobody else's for as long as the `with` block lasts.

  Raises:
    BadInput: another process has it.
    StorageError: the folder cannot be made or written.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = os.open(workdir / 'lock', os.O_RDWR | os.O_CREAT, 0o644)
  except OSError as error:
    raise _unwritable(workdir, error) from error
  try:
    _lock(workdir, lock)
    os.ftruncate(lock, 0)
    os.pwrite(lock, f'process {os.getpid()} on {socket.gethostname()}\n'.encode(), 0)
    yield workdir
  finally:
    os.close(lock)


def _lock(workdir: Path, lock: int) -> None:
  """Takes the lock or refuses. The kernel drops the lock of a dead process, so that none is ever stale."""
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    owner = os.pread(lock, 200, 0).decode(errors='replace').strip() or 'unknown'
    raise BadInput(
      f'workdir {workdir} is in use by another run ({owner}): wait for it or give another --workdir'
    ) from error
  except OSError as error:
    raise StorageError(f'workdir {workdir} cannot be locked: {error.strerror}') from error


def _unwritable(workdir: Path, error: OSError) -> StorageError:
  return StorageError(f'workdir {workdir} cannot be written: {error.strerror}')


def _changes(workdir: Path, config: Mapping[str, Any]) -> list[str]:
  """A line for each setting that differs from the run's config.json; refuses those that may not."""
  file = config_path(workdir)
  if not file.is_file():
    return []
  was, now = (
    _flat(with_later(values)) for values in (read_json(file), json.loads(json.dumps(config)))
  )
  lines = []
  for key in sorted(was.keys() | now.keys()):
    old, new = was.get(key, 'absent'), now.get(key, 'absent')
    if old == new:
      continue
    if not any(key == may or key.startswith(f'{may}.') for may in MAY_CHANGE):
      raise BadInput(
        f'workdir {workdir} holds another experiment: {key}={new!r} here and {old!r} there, '
        'which a resume may not change; give another --workdir'
      )
    lines.append(f'{workdir} goes on with {key}={new!r}, which was {old!r}')
  return lines


def _flat(values: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'optim.b1': 0.9, ...}."""
  flat: dict[str, Any] = {}
  for key, value in values.items():
    flat |= (
      _flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
    )
  return flat
