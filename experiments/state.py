"""The state of a run, created directly on its shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh.rules import like_params, param_shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes; pure dicts of arrays, no Flax type.

  Attributes:
    step: int32, steps taken, skipped ones included: what the data and the random keys follow.
    params: what the optimizer moves.
    routing: router state that no gradient moves (balancing biases).
    opt_state: of optax.
    skipped: int32, steps whose loss or gradient was not finite; they changed nothing but the counters.
    skipped_in_a_row: int32, such steps since the last good one.
  """

  step: jax.Array
  params: Any
  routing: Any
  opt_state: Any
  skipped: jax.Array
  skipped_in_a_row: jax.Array


class ModelDef:
  """The static half of a model: what turns pure dicts of arrays back into a module."""

  def __init__(self, make_model: Callable[[nnx.Rngs], nnx.Module]):
    self._make_model = make_model
    graphs = []

    def split(key: jax.Array) -> tuple[Any, Any]:
      graph, params, routing = self._split(key)
      graphs.append(graph)
      return params, routing

    self._params, self._routing = jax.eval_shape(split, jax.random.key(0))
    self._graph = graphs[0]

  def init(self, key: jax.Array) -> tuple[Any, Any]:
    """Pure dicts of initial parameters and routing state."""
    _, params, routing = self._split(key)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(routing)

  def model(self, params: Any, routing: Any) -> nnx.Module:
    """The module that holds these arrays."""
    states = []
    for template, values in ((self._params, params), (self._routing, routing)):
      state = jax.tree.map(lambda leaf: leaf, template)  # a copy: the template stays as it is
      nnx.replace_by_pure_dict(state, values)
      states.append(state)
    return nnx.merge(self._graph, *states)

  def _split(self, key: jax.Array) -> tuple[Any, Any, Any]:
    """Graph, parameters and routing state of a fresh model."""
    graph, *states = nnx.split(self._make_model(nnx.Rngs(key)), nnx.Param, ...)
    return graph, states[0], states[1]


def make_state(
  definition: ModelDef,
  make_optimizer: Callable[[Any], optax.GradientTransformation],
  mesh: Mesh,
) -> tuple[Callable[[jax.Array], TrainState], TrainState, optax.GradientTransformation]:
  """How to create a state, what it will look like, and the optimizer that belongs to it.

  Returns:
    A function of a key that computes the initial state, every array on its own shards from the start; the state of
    `jax.ShapeDtypeStruct` with shardings, to restore into; the optimizer.

  Raises:
    ValueError: parameters that do not divide over the mesh.
  """
  abstract_params, _ = jax.eval_shape(definition.init, jax.random.key(0))
  optimizer = make_optimizer(abstract_params)

  def init(key: jax.Array) -> TrainState:
    params, routing = definition.init(key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, routing, optimizer.init(params), zero, zero)

  abstract = jax.eval_shape(init, jax.random.key(0))
  replicated = NamedSharding(mesh, P())
  params = param_shardings(mesh, abstract.params)
  shardings = dataclasses.replace(
    jax.tree.map(lambda _: replicated, abstract),
    params=params,
    routing=param_shardings(mesh, abstract.routing),
    opt_state=like_params(mesh, abstract.opt_state, abstract.params, params),
  )
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    abstract,
    shardings,
  )
  return jax.jit(init, out_shardings=shardings), abstract, optimizer
