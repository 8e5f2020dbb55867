"""Kernels that a config asks for by name: what cannot run is refused before anything is written."""

from __future__ import annotations

import jax

from experiments.data import Stream
from experiments.errors import BadInput
from experiments.program import Program
from experiments.settings import Settings
from pallas_kernels import Unsupported, chips


def check_kernels(settings: Settings, program: Program, stream: Stream) -> None:
  """Asks the devices of the mesh, and traces the model: bodies refuse types and widths while they are traced.

  Raises:
    BadInput: `model.moe.implementation` on devices that it is not made for, or with types or widths it does not take.
  """
  moe = settings.model.moe
  if not settings.model.moe_layers or moe.implementation == 'auto':
    return
  shape = lambda x: jax.ShapeDtypeStruct((settings.batch_size, *x.shape[1:]), x.dtype)
  state = program.abstract
  try:
    for device in program.mesh.devices.flat:
      chips.check_device('model.moe', moe.implementation, device)
    jax.eval_shape(
      program.eval_step, state.params, state.routing, jax.tree.map(shape, stream.batch(0))
    )
  except Unsupported as error:
    accepted = "accepted are 'auto', 'blocks', or what this says"
    raise BadInput(
      f'model.moe.implementation={moe.implementation!r}: {error}; {accepted}'
    ) from error
