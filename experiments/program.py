"""What is compiled of an experiment; runs of one shape share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.state import ModelDef, TrainState, make_state
from experiments.step import Batch, Control, Metrics, make_eval_step, make_train_step


class Program:
  """A model on a mesh with its three functions: initial state, training step, evaluation step.

  Each is compiled by its first call. Nothing in here knows the seed, the number of steps or the learning rate: they are
  arguments.

  Args:
    definition: the model.
    make_optimizer: of abstract parameters.
    mesh: over all devices.
    microbatches, losses, other_losses, bias_rate, average_rate, consistency, output: see `make_train_step`.
    compiler_options: of XLA, for the training step.

  Attributes:
    mesh, definition, optimizer: as given.
    abstract: what a state looks like, with shardings, to restore into.
    init: `key -> TrainState`, on its shards from the start.
    eval_step: `(params, routing, batch) -> Totals`.

  Raises:
    ValueError: parameters that do not divide over the mesh.
  """

  def __init__(
    self,
    definition: ModelDef,
    make_optimizer: Callable[[Any], optax.GradientTransformation],
    mesh: Mesh,
    *,
    microbatches: int,
    losses: Mapping[str, float],
    other_losses: Mapping[str, Mapping[str, float]] | None = None,
    bias_rate: float,
    average_rate: float = 0.0,
    consistency: float = 0.0,
    output: str = 'softmax',
    compiler_options: Mapping[str, Any] | None = None,
  ):
    self.mesh = mesh
    self.definition = definition
    self.init, self.abstract, self.optimizer = make_state(definition, make_optimizer, mesh)
    replicated = NamedSharding(mesh, P())  # what is told must be whole in every process
    self.eval_step = jax.jit(make_eval_step(definition, output), out_shardings=replicated)
    step = make_train_step(
      definition,
      self.optimizer,
      microbatches=microbatches,
      losses=losses,
      other_losses=other_losses,
      bias_rate=bias_rate,
      average_rate=average_rate,
      consistency=consistency,
      output=output,
    )
    # where the state lay before: left to itself the compiler may cut a norm's scale, and refuse it in the next step
    kept = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    self._train_step = jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(kept, replicated),
      compiler_options=dict(compiler_options or {}),
    )
    self._compiled: Any = None

  @property
  def is_compiled(self) -> bool:
    """Whether the training step is."""
    return self._compiled is not None

  def compile(self, state: TrainState, batch: Batch, control: Control) -> None:
    """Compiles the training step for arrays like these."""
    self._compiled = self.lower(state, batch, control).compile()

  def lower(self, state: Any, batch: Any, control: Any) -> jax.stages.Lowered:
    """The training step for arrays like these, or for their shapes, ready to be compiled."""
    return self._train_step.lower(state, batch, control)

  def train_step(
    self, state: TrainState, batch: Batch, control: Control
  ) -> tuple[TrainState, Metrics]:
    """One step; the state that is given is used up."""
    if not self.is_compiled:
      self.compile(state, batch, control)
    return self._compiled(state, batch, control)
