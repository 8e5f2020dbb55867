"""Bytes between devices, read from the text of a compiled program.

A program that was compiled for a mesh, on any machine, names every collective with shapes and groups of devices. What
one device sends is what the ring algorithms send: a part of `b` bytes that each of `n` devices holds costs `b (n - 1)`
to gather, `b (n - 1) / n` to reduce and scatter or to send to all, twice that to reduce to all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

import numpy as np
from jax.sharding import Mesh

_KINDS = (
  'ragged-all-to-all|all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|'
  'collective-broadcast'
)
_COLLECTIVE = re.compile(rf' ({_KINDS})(?:-start)?\((.*)$')
_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = ')
_OPENS = re.compile(r'^(ENTRY )?%?([\w.-]+) .*\{\s*$')
_SHAPE = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\]')
_CALLS = re.compile(
  r'(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)'
)
_BRANCHES = re.compile(r'(?:branch_computations|called_computations)=\{([^}]*)\}')
# v5e runs a collective in pieces beside the work of several fusions, each of which names it again
_CONTINUES = re.compile(
  r' [a-z-]+-(done|update)\(|^\s*(ROOT )?%async-collective-done[\w.-]* = |calls=%async_collective_fusion'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective operation of a compiled program.

  Attributes:
    kind: 'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all' or 'collective-permute'.
    operand: bytes that a device puts in.
    groups: devices that work together, as positions in the mesh; pairs (from, to) of a permutation.
    times: how often it runs, loops of known length counted.
    conditional: it stands in a branch, and may not run.
    source: the operation it was made from, such as 'jit(step)/transpose(jvp())/shard_map/all_to_all'.
  """

  kind: str
  operand: int
  groups: tuple[tuple[int, ...], ...]
  times: int
  conditional: bool
  source: str

  @property
  def sent(self) -> float:
    """Bytes that one device sends in all runs; of a ragged exchange, at most."""
    size = max(map(len, self.groups), default=1)
    if self.kind == 'collective-permute':
      travels = any(start != end for start, end in self.groups)
      return float(self.times * self.operand * travels)
    share = (size - 1) / size
    factor: dict[str, float] = {
      'all-gather': size - 1,
      'all-reduce': 2 * share,
      'collective-broadcast': 1.0,
    }
    return float(self.times * self.operand * factor.get(self.kind, share))


def collectives(compiled: Any, num_devices: int) -> list[Collective]:
  """The collectives of a compiled program (or its text), those between one device alone left out.

  Loops of unknown length count once, each branch of a condition counts. The text must be of a program that was
  partitioned for `num_devices`.
  """
  text = compiled if isinstance(compiled, str) else compiled.as_text()
  computations, entry = _computations(text)
  sizes = {
    match[1]: _bytes(_type_of(line[match.end() :]))
    for lines in computations.values()
    for line in lines
    if (match := _NAMED.match(line))
  }
  found = []
  for computation, (times, conditional) in _reached(computations, entry).items():
    for line in computations[computation]:
      match = _COLLECTIVE.search(line)
      if match:
        kind, rest = match[1], match[2]
        if computation.startswith('all-reduce-scatter'):  # how TPUs spell it: a fusion with a slice
          kind = 'reduce-scatter'
        groups = _groups(rest, num_devices, kind)
        source = re.search(r'op_name="([^"]*)"', rest)
        one = Collective(
          kind, _operand(rest, sizes, kind), groups, times, conditional, source[1] if source else ''
        )
        if one.sent:
          found.append(one)
  return found


def collective_bytes(compiled: Any, mesh: Mesh) -> dict[tuple[str, tuple[str, ...]], float]:
  """(kind, mesh axes) -> bytes that one device sends, summed over all collectives, both branches of conditions."""
  total: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
  for one in collectives(compiled, mesh.size):
    total[one.kind, axes_of(one, mesh)] += one.sent
  return dict(total)


def axes_of(collective: Collective, mesh: Mesh) -> tuple[str, ...]:
  """Mesh axes along which the devices of a group differ, in the order of the mesh."""
  shape = tuple(mesh.shape.values())
  places = [
    np.array(np.unravel_index(group, shape)) for group in collective.groups
  ]  # [axes, devices]
  return tuple(
    axis for i, axis in enumerate(mesh.axis_names) if any(len(set(p[i])) > 1 for p in places)
  )


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Name -> lines, and the name of the entry."""
  found: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    opens = None if line.startswith(' ') else _OPENS.match(line)
    if opens and not line.startswith('HloModule'):
      lines = found.setdefault(opens[2], [])
      entry = opens[2] if opens[1] else entry
    else:
      lines.append(line)
  return found, entry


def _reached(computations: dict[str, list[str]], entry: str) -> dict[str, tuple[int, bool]]:
  """Computation -> (how often it runs, whether it may not run)."""
  reached: dict[str, tuple[int, bool]] = {}
  todo = [(entry, 1, False)]
  while todo:
    name, times, conditional = todo.pop()
    before, always = reached.get(name, (0, True))
    reached[name] = (before + times, conditional and always)
    for line in computations.get(name, ()):
      if _CONTINUES.search(line):  # the start has counted
        continue
      trips = _loop_length(line, computations)
      for key, callee in _CALLS.findall(line):
        loop = key in ('body', 'condition') and trips
        branch = conditional or key.endswith('_computation')
        todo.append((callee, times * (trips if loop else 1), branch))
      for names in _BRANCHES.findall(line):
        branch = conditional or 'branch_computations' in line
        todo += [(callee, times, branch) for callee in re.findall(r'[\w.-]+', names)]
  return {name: value for name, value in reached.items() if name in computations}


def _loop_length(line: str, computations: dict[str, list[str]]) -> int:
  """Turns of the loop of this line: as annotated, or (TPU) the constant that its counter is compared with; else 0."""
  said = _TRIPS.search(line)
  if said:
    return int(said[1])
  condition = re.search(r' while\(.*condition=%?([\w.-]+)', line)
  lines = computations.get(condition[1], ()) if condition else ()
  compared = re.search(r'ROOT .* compare\([^,]*, %?([\w.-]+)\), direction=LT', '\n'.join(lines))
  if not compared:
    return 0
  name = re.escape(compared[1])
  found = [re.search(rf'%?{name} = s32\[\]\S* constant\((\d+)\)', one) for one in lines]
  return next((int(match[1]) for match in found if match), 0)


def _type_of(text: str) -> str:
  """'(f32[4]{0}, s32[])' of '(f32[4]{0}, s32[]) fusion(...)': up to the name of the operation."""
  if not text.startswith('('):
    return text.partition(' ')[0]
  depth = 0
  for end, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return text[:end]
  return text


def _bytes(text: str) -> int:
  """Of all arrays in a type."""
  total = 0
  for kind, dims in _SHAPE.findall(text):
    bits = re.search(r'\d+', kind)
    width = 8 if kind == 'pred' else int(bits[0]) if bits else 0
    total += math.prod(int(d) for d in dims.split(',') if d) * width // 8
  return total


def _operand(rest: str, sizes: dict[str, int], kind: str) -> int:
  """Bytes of the operands; of a ragged exchange, of source or target, the others being integers.

  Its devices send together what they receive, so that on average neither fills more than the smaller of the two.
  """
  inside = re.split(r'\), (?:channel_id|replica_groups|source_target_pairs)=', rest)[0]
  names = re.findall(r'%([\w.-]+)', inside)
  found = [sizes.get(name, 0) for name in names]
  return min(found[:2], default=0) if kind.startswith('ragged') else sum(found)


def _groups(rest: str, num_devices: int, kind: str) -> tuple[tuple[int, ...], ...]:
  key = 'source_target_pairs' if kind == 'collective-permute' else 'replica_groups'
  lists = re.search(rf'{key}=\{{(\{{.*?\}})\}}', rest)
  if lists:
    return tuple(tuple(map(int, g.split(','))) for g in re.findall(r'\{([\d,]+)\}', lists[1]))
  tiled = re.search(rf'{key}=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', rest)
  if tiled:
    ids = np.arange(num_devices).reshape([int(d) for d in tiled[3].split(',')])
    ids = ids.transpose([int(a) for a in tiled[4].split(',')]) if tiled[4] else ids
    return _tuples(ids.reshape(int(tiled[1]), int(tiled[2])))
  named = re.search(rf'{key}=mesh\[([^\]]*)\](.*?) ?\{{([^}}]*)\}}', rest)
  if named:
    return _named_groups(named[1], named[2], named[3])
  return (tuple(range(num_devices)),)


def _named_groups(mesh: str, order: str, axes: str) -> tuple[tuple[int, ...], ...]:
  """`mesh['a'=2,'b'=4] {'b':(1)2}`: along the axes, or along a part of one: (sizes before), size."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  permuted = re.search(r'device_ids=\(?\[([\d,]+)\]\)?(?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?', order)
  if permuted and permuted[2]:
    ids = ids.reshape([int(d) for d in permuted[2].split(',')])
    ids = ids.transpose([int(a) for a in permuted[3].split(',')]) if permuted[3] else ids
  parts: list[tuple[str, int]] = []  # every axis cut into the parts that are used and the rest
  used = set()
  for name, size in sizes.items():
    cuts = sorted(
      (int(before), int(part))
      for before, part in re.findall(rf"'{re.escape(name)}':\((\d+)\)(\d+)", axes)
    )
    whole = re.search(rf"'{re.escape(name)}'(?!:)", axes)
    cuts = [(1, size)] if whole else cuts
    done = 1
    for before, part in cuts:
      if before > done:
        parts.append((name, before // done))
      used.add(len(parts))
      parts.append((name, part))
      done = before * part
    if done < size:
      parts.append((name, size // done))
  ids = ids.reshape([size for _, size in parts])
  along = sorted(used)
  others = [i for i in range(len(parts)) if i not in used]
  count = math.prod(parts[i][1] for i in along)
  return _tuples(ids.transpose(others + along).reshape(-1, count))


def _tuples(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(int(i) for i in row) for row in ids)
