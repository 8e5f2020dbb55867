"""Checkpoints that restore to every bit or say why not: Orbax for the arrays, our own digests of them.

Orbax writes atomically and asynchronously, but its array files carry no checksum (a flipped bit restores as another
weight), it casts dtypes silently, and it does not try an older checkpoint when the newest is broken. So a checkpoint is
  <step>/state   the leaves of a pytree as a dict of dicts of arrays: no Flax or Optax type
  <step>/meta    JSON: step, versions, what the caller adds (config, data fingerprint), and of each leaf path, dtype,
                 shape and sha256 (digests.py)
and a restore compares all of it. A checkpoint that fails is renamed to <step>.corrupt and the one before is tried.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from experiments.digests import describe, differing
from experiments.errors import BadInput, DataError, StorageError

# the status codes by which TensorStore tells what a file system did
_STORAGE = re.compile(
  'RESOURCE_EXHAUSTED|OUT_OF_RANGE|PERMISSION_DENIED|NOT_FOUND|UNAVAILABLE|UNKNOWN|INTERNAL|DATA_LOSS|[Ee]rrno'
)
# a file that cannot be reached now is no broken one
_UNREACHABLE = re.compile(
  '|'.join(
    ['UNAVAILABLE', 'DEADLINE_EXCEEDED']
    + [os.strerror(code) for code in (errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT)]
  )
)
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without Orbax's warning that a folder is opened for reading, which was asked for."""
  before = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(before)


class Checkpoints:
  """The checkpoints of a run in one folder. In a run of several processes each calls every method."""

  def __init__(self, folder: Path, keep: int = 2, read_only: bool = False):
    """Opens or makes `folder`, removing what a killed save left.

    Args:
      folder: its full path is in every message.
      keep: how many of the newest stay; at least 2, so that one may break.
      read_only: for programs that only look: nothing is removed or renamed.
    """
    self.folder = folder.absolute()
    self._read_only = read_only
    self._saved: int | None = None
    if read_only:  # Orbax would set the other two itself, with warnings
      options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    else:
      options = ocp.CheckpointManagerOptions(max_to_keep=keep)
    try:
      if not read_only:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_unfinished()
      with _quiet() if read_only else contextlib.nullcontext():
        self._manager = ocp.CheckpointManager(self.folder, options=options)
    except OSError as error:
      raise StorageError(
        f'checkpoints {self.folder} cannot be written: {error.strerror}'
      ) from error

  def steps(self) -> list[int]:
    """Steps of the checkpoints that were completed, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Saves in the background, after an earlier save is done; returns when `state` may be donated.

    Args:
      step: how many updates `state` has seen; larger than that of every checkpoint in the folder.
      state: any pytree of arrays.
      meta: JSON values, such as the config and the data's fingerprint.

    Raises:
      StorageError: this or the save before failed; the checkpoints before are intact.
    """
    if step == self._saved:
      return
    self.wait()
    leaves = _by_path(state)
    checked = {'step': step, 'versions': _versions(), **meta, 'leaves': describe(leaves)}
    checked = json.loads(json.dumps(checked, allow_nan=False))
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(_nested(_filled(leaves))),
      meta=ocp.args.JsonSave({**checked, 'digest': _digest_json(checked)}),
    )
    try:
      accepted = self._manager.save(step, args=args)
    except (OSError, ValueError, RuntimeError) as error:
      self._fail(step, error)
    if not accepted:  # Orbax refuses a step below the newest, and says so by this alone
      raise StorageError(
        f'checkpoint {self.folder}/{step} was refused: the folder has {self.steps()}'
      )
    self._saved = step

  def wait(self) -> None:
    """Returns when the last save is on the disk.

    Raises:
      StorageError: it is not.
    """
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError, RuntimeError) as error:
      self._fail(self._saved, error)

  def restore(
    self, abstract_state: Any, step: int | None = None
  ) -> tuple[Any, dict[str, Any]] | None:
    """The newest good checkpoint as (state, meta); None in a folder where nothing was ever saved.

    Args:
      abstract_state: pytree of jax.ShapeDtypeStruct with shardings (or of arrays); leaves are placed on these.
      step: only this one, and no other when it is broken.

    Raises:
      BadInput: the checkpoint holds other leaves, shapes or dtypes than `abstract_state`, or there is no `step`.
      DataError: nothing in the folder restores.
      StorageError: the folder cannot be reached now, as a file server that does not answer; all stay as they are.
    """
    steps = self.steps() if step is None else [step]
    if step is not None and step not in self.steps():
      raise BadInput(f'{self.folder} has no checkpoint {step}: it has {self.steps()}')
    for one in reversed(steps):
      try:
        return self._restore(one, abstract_state)
      except _Corrupt as error:
        self._set_aside(one, str(error), more=step is None)
    if steps or any(self.folder.glob('*.corrupt*')):
      raise DataError(
        f'no checkpoint in {self.folder} can be restored: start in another --workdir, or repair this one'
      )
    return None

  def close(self) -> None:
    """Waits for the last save and ends Orbax's threads."""
    self.wait()
    self._manager.close()

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
    if kind is None:
      self.close()
    else:  # the error at hand is the one to tell
      try:
        self.close()
      except StorageError as error:
        print(error, file=sys.stderr)

  def _restore(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
    meta = self._read(step, 'meta', ocp.args.JsonRestore())
    if not isinstance(meta, dict) or meta.pop('digest', None) != _digest_json(meta):
      raise _Corrupt('meta does not have its digest')
    wanted = _by_path(abstract_state)
    self._compare(step, meta['leaves'], wanted)
    target = {path: _struct(path, leaf) for path, leaf in wanted.items()}
    args = ocp.args.StandardRestore(_nested(_filled(target)))
    leaves = _by_path(self._read(step, 'state', args))
    for path in target.keys() - leaves.keys():
      leaves[path] = jax.device_put(
        np.zeros(target[path].shape, target[path].dtype), target[path].sharding
      )
    path = differing(leaves, meta['leaves'])
    if path is not None:
      raise _Corrupt(f'{path} does not have its digest')
    structure = jax.tree.structure(abstract_state)
    return jax.tree.unflatten(structure, [leaves[path] for path in wanted]), meta

  def _read(self, step: int, item: str, args: Any) -> Any:
    try:
      return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
    except (MemoryError, PermissionError):
      raise
    except Exception as error:  # what a broken file makes Orbax raise is of any kind
      if 'RESOURCE_EXHAUSTED' in str(error):  # the device is full: no fault of the file
        raise
      if _UNREACHABLE.search(str(error)):
        raise StorageError(
          f'checkpoint {self.folder}/{step} cannot be read now: {_first_line(error)}'
        ) from error
      raise _Corrupt(
        f'{item} cannot be read: {type(error).__name__}: {_first_line(error)}'
      ) from error

  def _compare(self, step: int, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another model: Orbax would cast dtypes silently."""
    lines = []
    for path in sorted(saved.keys() | wanted.keys()):
      leaf = wanted.get(path)
      there = f'{saved[path][0]}{tuple(saved[path][1])}' if path in saved else 'absent'
      here = f'{leaf.dtype}{tuple(leaf.shape)}' if leaf is not None else 'absent'
      if there != here:
        lines.append(f'{path} is {there} there and {here} here')
    if lines:
      more = f', and {len(lines) - 5} more' if len(lines) > 5 else ''
      raise BadInput(f'{self.folder}/{step} is of another model: {"; ".join(lines[:5])}{more}')

  def _set_aside(self, step: int, reason: str, more: bool) -> None:
    print(
      f'checkpoint {self.folder}/{step} is corrupt ({reason})'
      + (', trying the one before' if more else ''),
      file=sys.stderr,
    )
    if self._read_only:
      return
    if jax.process_index() == 0:
      to = self.folder / f'{step}.corrupt'
      while to.exists():
        to = to.with_name(f'{to.name}+')
      (self.folder / str(step)).rename(to)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'corrupt checkpoint {step}')
    self._manager.reload()

  def _remove_unfinished(self) -> None:
    """Removes half-written checkpoints at once; Orbax would in a thread that it waits for before a save alone."""
    if jax.process_index() == 0:
      for rest in self.folder.glob('*.orbax-checkpoint-tmp*'):
        shutil.rmtree(rest, ignore_errors=True)

  def _fail(self, step: int | None, error: Exception) -> NoReturn:
    """Raises for a failed save, after removing its half-written folder, which would keep a full disk full."""
    if not self._read_only:
      self._remove_unfinished()
    if not isinstance(error, OSError) and not _STORAGE.search(str(error)):
      raise error
    message = f'checkpoint {self.folder}/{step} was not saved: {_first_line(error)}'
    raise StorageError(message) from error


class _Corrupt(Exception):
  """A checkpoint that cannot be read, or that is not what was saved."""


def _by_path(tree: Any) -> dict[str, Any]:
  """{'opt_state/0/mu/w': leaf, ...} in the order of the leaves."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Dicts of dicts, as Orbax wants its paths."""
  nested: dict[str, Any] = {}
  for path, leaf in leaves.items():
    *folders, name = path.split('/')
    level = nested
    for folder in folders:
      level = level.setdefault(folder, {})
    level[name] = leaf
  return nested


def _filled(leaves: Mapping[str, Any]) -> dict[str, Any]:
  """Without the arrays that have no element, which Orbax refuses."""
  return {path: leaf for path, leaf in leaves.items() if leaf.size}


def _struct(path: str, leaf: Any) -> jax.ShapeDtypeStruct:
  if getattr(leaf, 'sharding', None) is None:
    raise ValueError(f'{path} has no sharding: a checkpoint is restored onto given devices')
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _digest_json(values: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _versions() -> dict[str, str]:
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version(), **versions}


def _first_line(error: BaseException) -> str:
  first = (str(error).strip() or type(error).__name__).splitlines()[0]
  return first.partition(' [tensorstore_spec')[0]  # thousands of characters of no use
