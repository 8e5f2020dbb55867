"""The parameters of a model with the rule that shards each: made of shapes, no array."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax

from experiments.build import open_stream
from experiments.errors import BadInput
from experiments.make_model import model_maker
from experiments.settings import Settings
from experiments.state import ModelDef
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import path_name, rule_of


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One parameter, layers stacked.

  Attributes:
    path: such as 'stack/segments/0/blocks/0/moe/experts/w_up'.
    shape: of all layers.
    rule: the pattern of moejax/mesh/rules.py that it matches.
    axes: for every dimension the mesh axes that it is sharded over.
    trained: False for a router's balancing state.
  """

  path: str
  shape: tuple[int, ...]
  rule: str
  axes: tuple[tuple[str, ...], ...]
  trained: bool = True

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def group(self) -> str:
    """'embedding', 'head', 'experts', 'heads' (that are experts), 'router' or 'dense' (the rest: attention,
    feed-forward, shared experts, norms)."""
    if self.path.startswith(('embed/', 'head/')):
      return 'embedding' if self.path.startswith('embed/') else 'head'
    if '/moe/' in self.path and '/experts/' in self.path:
      return 'experts'
    if '/attention/w_' in self.path:
      return 'heads'
    return 'router' if '/router/' in self.path or self.path.endswith('_router') else 'dense'

  def shards(self, sizes: Mapping[str, int], only: Sequence[str] | None = None) -> int:
    """Over how many devices it is cut, or over how many along `only` these axes."""
    used = [axis for axes in self.axes for axis in axes if only is None or axis in only]
    return math.prod(sizes.get(axis, 1) for axis in used)

  def divides(self, sizes: Mapping[str, int]) -> bool:
    return all(
      size % math.prod(sizes.get(axis, 1) for axis in axes) == 0
      for size, axes in zip(self.shape, self.axes, strict=True)
    )


def data_shape(settings: Settings) -> Any:
  """What a model must know of its data, from the settings alone where these say it.

  Raises:
    BadInput: data that is not here, of which nothing is known.
  """
  if settings.model.vocab_size:
    return SimpleNamespace(vocab_size=settings.model.vocab_size, image_shape=None, num_classes=None)
  try:
    return open_stream(settings, train=True)
  except BadInput as error:
    raise BadInput(
      f'{error}; or, to plan without data, give --config.model.vocab_size=N'
    ) from error


def tensors(settings: Settings) -> list[Tensor]:
  """All parameters, and the routers' state, of the model of these settings.

  Raises:
    BadInput: a parameter that no rule matches, or two.
  """
  alone = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, data_shape(settings), alone))
  params, routing = jax.eval_shape(definition.init, jax.random.key(0))
  found = []
  for tree, trained in ((params, True), (routing, False)):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      name = path_name(path)
      try:
        pattern, spec = rule_of(name)
      except ValueError as error:
        raise BadInput(str(error)) from error
      axes = ((),) * (leaf.ndim - len(spec)) + tuple(map(_as_axes, spec))
      found.append(Tensor(name, tuple(leaf.shape), pattern, axes, trained))
  return found


def _as_axes(entry: Any) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def by_sharding(found: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
  """One tensor of each (group, axes) and how many elements all of them have."""
  sizes: defaultdict[tuple, int] = defaultdict(int)
  first: dict[tuple, Tensor] = {}
  for tensor in found:
    key = (tensor.group, tuple(filter(None, tensor.axes)), tensor.trained)
    sizes[key] += tensor.size
    first.setdefault(key, tensor)
  return [(first[key], sizes[key]) for key in first]
