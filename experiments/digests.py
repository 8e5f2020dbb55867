"""Digests of the leaves of a state, of which no process needs to hold a whole leaf.

A leaf that is spread over processes is cut into the equal parts that its devices hold; each process digests those that
lie with it, 32 bytes of each are exchanged, and the leaf's digest is that of its parts' digests in row-major order. How
it was cut stands beside, so that it can be made again of any other layout; there, parts that no process holds whole
are the exception, and their leaf is gathered.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_SIZE = hashlib.sha256().digest_size


def describe(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
  """path -> [dtype, shape, sha256], and of a leaf that is spread over processes in how many parts each dimension is
  cut; without that, equal for equal values on any mesh. In a run of several processes each calls this, and has all."""
  cuts = {path: _cuts(leaf) for path, leaf in leaves.items()}
  digests = _digests(leaves, cuts)
  return {
    path: [str(leaf.dtype), list(leaf.shape), digests[path], *([cuts[path]] if cuts[path] else [])]
    for path, leaf in leaves.items()
  }


def differing(leaves: Mapping[str, Any], described: Mapping[str, Sequence[Any]]) -> str | None:
  """The first path whose leaf is not the described one; None: all are. The same in every process."""
  cuts = {path: list(described[path][3]) if len(described[path]) > 3 else [] for path in leaves}
  digests = _digests(leaves, cuts)
  for path, leaf in leaves.items():
    if [str(leaf.dtype), list(leaf.shape), digests[path]] != list(described[path][:3]):
      return path
  return None


def _cuts(leaf: Any) -> list[int]:
  """In how many parts each dimension is cut; nothing of a leaf that every process holds."""
  if not _is_spread(leaf):
    return []
  part = leaf.sharding.shard_shape(leaf.shape)
  return [size // own for size, own in zip(leaf.shape, part, strict=True)]


def _is_spread(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _digests(leaves: Mapping[str, Any], cuts: Mapping[str, list[int]]) -> dict[str, str]:
  """path -> digest of the leaf, cut so; nothing: as one."""
  numbers = {path: list(np.ndindex(*cuts[path])) for path in leaves}
  held = {path: _held(leaf, cuts[path], numbers[path]) for path, leaf in leaves.items()}
  with ThreadPoolExecutor() as pool:
    own = pool.map(_sha256, itertools.chain.from_iterable(held.values()))
    found = _exchanged(list(own))
  digests = {}
  for path, leaf in leaves.items():
    parts, found = found[: len(numbers[path])], found[len(numbers[path]) :]
    if None in parts:
      whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
      parts = [_sha256(whole[_where(whole.shape, cuts[path], at)]) for at in numbers[path]]
    known = [part for part in parts if part is not None]
    digests[path] = (hashlib.sha256(b''.join(known)).digest() if cuts[path] else known[0]).hex()
  return digests


def _held(
  leaf: Any, cuts: Sequence[int], numbers: Sequence[tuple[int, ...]]
) -> list[np.ndarray | None]:
  """The parts of these numbers, as far as this process holds them whole."""
  if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
    pieces = [((0,) * leaf.ndim, np.asarray(leaf))]
  else:
    pieces = [
      (tuple(cut.start or 0 for cut in shard.index), np.asarray(shard.data))
      for shard in leaf.addressable_shards
    ]
  return [_inside(pieces, _where(leaf.shape, cuts, at)) for at in numbers]


def _inside(
  pieces: Sequence[tuple[tuple[int, ...], np.ndarray]], where: tuple[slice, ...]
) -> np.ndarray | None:
  """What stands there, of the first piece `(its start, values)` that has all of it."""
  for start, values in pieces:
    if not where:
      return values
    own = [slice(w.start - s, w.stop - s) for w, s in zip(where, start, strict=True)]
    if all(o.start >= 0 and o.stop <= n for o, n in zip(own, values.shape, strict=True)):
      return values[tuple(own)]
  return None


def _where(shape: Sequence[int], cuts: Sequence[int], at: tuple[int, ...]) -> tuple[slice, ...]:
  """The part of this number; everything when nothing is cut."""
  sizes = [size // cut for size, cut in zip(shape, cuts, strict=False)]
  if not cuts:
    return tuple(slice(0, size) for size in shape)
  return tuple(slice(i * size, (i + 1) * size) for i, size in zip(at, sizes, strict=True))


def _exchanged(own: list[bytes | None]) -> list[bytes | None]:
  """Of every part the digest that some process has; where two differ, one that is neither's."""
  if jax.process_count() == 1:
    return own
  table = np.zeros((len(own), 1 + _SIZE), np.uint8)
  for row, digest in zip(table, own, strict=True):
    if digest is not None:
      row[:] = np.frombuffer(b'\1' + digest, np.uint8)
  gathered = np.asarray(multihost_utils.process_allgather(table)).astype(np.uint8)
  found: list[bytes | None] = []
  for rows in gathered.transpose(1, 0, 2):
    known = sorted({row[1:].tobytes() for row in rows if row[0]})
    found.append(hashlib.sha256(b''.join(known)).digest() if len(known) > 1 else None)
    if len(known) == 1:
      found[-1] = known[0]
  return found


def _sha256(array: np.ndarray | None) -> bytes | None:
  if array is None:
    return None
  return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()
