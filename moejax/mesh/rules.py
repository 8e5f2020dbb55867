"""Where parameters lie: one table of path patterns. A parameter that no row matches, or two, is an error.

A row gives the mesh axes of the last dimensions of a parameter; a leading layer axis is never sharded. The one table
serves every strategy: an axis of size one shards nothing, so that a mesh of `data` alone is data parallelism, of `fsdp`
fully sharded data parallelism, of `expert` and `tensor` expert and tensor parallelism, and any product is one. The
optimizer's moments carry their parameter's path at the end of their own and so follow the same table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Axes = str | tuple[str, ...] | None
Rule = tuple[str, tuple[Axes, ...]]

SCORER = r'(moe/([a-z]+/)?|attention/)router/scorer'

RULES: tuple[Rule, ...] = (
  # experts over `expert`, their model width over `fsdp`, their hidden width over `tensor`
  (r'moe/([a-z]+/)?experts/(w_gate|w_up)', ('expert', 'fsdp', 'tensor')),
  (r'moe/([a-z]+/)?experts/w_down', ('expert', 'tensor', 'fsdp')),
  (r'moe/([a-z]+/)?(shared|core)/(w_gate|w_up)', (None, 'fsdp', 'tensor')),
  (r'moe/([a-z]+/)?(shared|core)/w_down', (None, 'tensor', 'fsdp')),
  # stacked mixtures without choice
  (r'moe/(first|second)/kernel', ('expert', 'fsdp', None)),
  (r'moe/(first|second)/gate_(in|out)(_offset)?', ()),
  # experts of one neuron (PEER): what makes its row of a token's width
  (r'moe/(w_up|w_down)', (None, 'fsdp')),
  # what stands around a bank: small, except for projections of the width of the model
  (r'moe/([a-z]+/)?(zero/(mix|value)|shared_mix/(weight|bias)|keys)', ()),
  (r'moe/(query|split|merge)/weight', ('fsdp', None)),
  (r'moe/(split|merge|query)/bias', ()),
  # of nested experts, whose weights are those of a dense layer
  (r'moe/(gate_kernel|gate_offset|alpha)', ()),
  # routers are small, and float32 on every device: products of the token, of what came of it, and beside them
  (rf'{SCORER}/((linear|first|second)/)?kernel', ()),
  (rf'{SCORER}/(noise_kernel|next_kernel|project|gate|skip|value)', ()),
  (rf'{SCORER}/(phi|centroids|residual|embedding|(first|second)/base)', ()),
  (rf'{SCORER}/(scale|offset|norm_scale|temperature)', ()),
  (rf'{SCORER}/cell/(into|over|offset|over_offset)', ()),
  # drawn once and never changed
  (rf'{SCORER}/(seed|table)', ()),
  # of blocks that tokens skip
  (r'blocks/\d+/router/(score|hidden|out)/(weight|bias)', ()),
  (r'stack/shared/(enter/weight|kernel|into|over|offset|over_offset)', ()),
  (r'moe/([a-z]+/)?router/bias', ()),
  # the rest of a block: width of the model over `fsdp`, heads and hidden width over `tensor`
  (r'(attention/(query|key|value)|ffn/(gate|up))/weight', ('fsdp', 'tensor')),
  (r'attention/bias/relative_positions', ()),
  # latent attention: narrow on one side, which a large axis does not divide; the other side is cut over both
  (r'attention/(query|kv)_down/weight', (('tensor', 'fsdp'), None)),
  (r'attention/(query|kv)_up/weight', (None, ('tensor', 'fsdp'))),
  # heads as experts: stacked matrices, each as narrow as a head on one side
  (r'attention/(w_query|w_value)', (None, 'fsdp', None)),
  (r'attention/w_out', (None, None, 'fsdp')),
  (r'attention/(value|out)_router', ()),
  (r'(attention/out|ffn/down)/weight', ('tensor', 'fsdp')),
  (r'(attention/\w+|ffn/\w+)/bias', ()),
  (r'(attention/)?\w*norm/(scale|bias)', ()),
  (r'embed/weight', (None, 'fsdp')),
  (r'embed/bias', ()),
  (r'positions', ()),
  (r'head/weight', ('fsdp', None)),
  (r'head/bias', ()),
)
"""(pattern of the end of a path, mesh axes of the last dimensions)."""


def path_name(path: Sequence[Any]) -> str:
  """'stack/segments/0/blocks/1/moe/experts/w_up' of a key path."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def rule_of(name: str, rules: Sequence[Rule] = RULES) -> Rule:
  """The rule that the parameter of this path matches.

  Raises:
    ValueError: no rule matches, or more than one does.
  """
  found = [rule for rule in rules if re.search(rf'(^|/){rule[0]}$', name)]
  if len(found) != 1:
    which = ' and '.join(repr(pattern) for pattern, _ in found) or 'none'
    raise ValueError(
      f'parameter {name} must match one rule of moejax/mesh/rules.py: it matches {which}'
    )
  return found[0]


def spec_of(name: str, ndim: int, rules: Sequence[Rule] = RULES) -> P:
  """The partition of the parameter of this path; errors as of `rule_of`."""
  axes = rule_of(name, rules)[1]
  return P(*(None,) * (ndim - len(axes)), *axes) if axes else P()


def param_shardings(mesh: Mesh, params: Any, rules: Sequence[Rule] = RULES) -> Any:
  """A sharding for every leaf of a pytree of (abstract) parameters; axes that the mesh lacks shard nothing.

  Raises:
    ValueError: a leaf that no rule or two rules match, or that does not divide over its axes.
  """

  def place(path, leaf):
    name = path_name(path)
    spec = on_mesh(mesh, spec_of(name, leaf.ndim, rules))
    for size, entry in zip(leaf.shape, spec, strict=False):
      axes = axis_names(entry)
      shards = math.prod(mesh.shape[axis] for axis in axes)
      if size % shards:
        which = 'axis' if len(axes) == 1 else 'axes'
        raise ValueError(
          f'{name} of size {size} does not divide over mesh {which} {",".join(axes)}={shards}'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, params)


def axis_names(entry: Axes) -> tuple[str, ...]:
  """The axes of one dimension of a partition, the first one slowest."""
  return (entry,) if isinstance(entry, str) else entry or ()


def on_mesh(mesh: Mesh, spec: P) -> P:
  """The partition without the axes that the mesh lacks."""

  def present(entry: Axes) -> Axes:
    if isinstance(entry, tuple):
      return tuple(axis for axis in entry if axis in mesh.shape) or None
    return entry if entry in mesh.shape else None

  return P(*map(present, spec))


def like_params(mesh: Mesh, tree: Any, params: Any, shardings: Any) -> Any:
  """Shardings of a tree that follows `params` (optimizer state), by path and shape; scalars are on every device.

  A leaf of its parameter's shape lies as the parameter does. One of that shape without one axis (Adafactor's factors)
  lies as what is left of it; where two axes are equally long, so that either may be the one that is gone, an axis on
  which the two readings differ is not sharded. An array of one element (a factor that is not used) is on every device.

  Raises:
    ValueError: an array that follows no parameter.
  """
  known = {
    path_name(path): (leaf.shape, sharding)
    for (path, leaf), sharding in zip(
      jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
    )
  }

  def place(path, leaf):
    name = path_name(path)
    for start in range(len(path)):
      shape, sharding = known.get(path_name(path[start:]), (None, None))
      if shape == leaf.shape:
        return sharding
      if shape is not None and leaf.ndim == len(shape) - 1:
        spec = factor_spec(shape, leaf.shape, sharding.spec)
        if spec is not None:
          return NamedSharding(mesh, spec)
    if leaf.size > 1:
      raise ValueError(f'{name} of shape {leaf.shape} follows no parameter')
    return NamedSharding(mesh, P())

  return jax.tree_util.tree_map_with_path(place, tree)


def factor_spec(shape: tuple[int, ...], factor: tuple[int, ...], spec: P) -> P | None:
  """The partition of a factor, an array of `shape` without one axis; None where it is not that."""
  axes = (*spec, *(None,) * (len(shape) - len(spec)))
  readings = [
    axes[:gone] + axes[gone + 1 :]
    for gone in range(len(shape))
    if shape[:gone] + shape[gone + 1 :] == factor
  ]
  if not readings:
    return None
  return P(*(each[0] if len(set(each)) == 1 else None for each in zip(*readings, strict=True)))
