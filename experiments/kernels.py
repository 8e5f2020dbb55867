"""Kernels and exchanges that a config asks for: what cannot run is refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax

from experiments.data import Stream
from experiments.errors import BadInput
from experiments.program import Program
from experiments.settings import Settings
from pallas_kernels import Unsupported, chips


def check_devices(settings: Settings, devices: Iterable[Any]) -> None:
  """Asks the devices, which may be described ones.

  Raises:
    BadInput: `model.moe.implementation` is made for others.
  """
  if not settings.model.moe_layers:
    return
  try:
    for device in devices:
      chips.check_device('model.moe', settings.model.moe.implementation, device)
  except Unsupported as error:
    raise refusal(settings, error) from error


def check_kernels(settings: Settings, program: Program, stream: Stream) -> None:
  """Asks the devices, and traces the model: bodies refuse types and widths while they are traced.

  Raises:
    BadInput: `model.moe.implementation` on devices that it is not made for, or with types or widths it does not take.
  """
  moe = settings.model.moe
  if not settings.model.moe_layers or moe.implementation == 'auto':
    return
  check_devices(settings, program.mesh.devices.flat)
  try:
    _trace(settings.batch_size, program, stream)
  except Unsupported as error:
    raise refusal(settings, error) from error


def check_exchange(settings: Settings, program: Program, stream: Stream) -> None:
  """Traces the model on a microbatch: options are compared with what a device has of it while it is traced.

  Raises:
    BadInput: `model.moe.exchange_options` that do not fit the tokens or the experts of a device.
  """
  options = settings.model.moe.exchange_options
  if not settings.model.moe_layers or not options or program.mesh.size == 1:
    return
  try:
    _trace(settings.batch_size // settings.microbatches, program, stream)
  except ValueError as error:
    raise BadInput(f'model.moe.exchange_options={options}: {error}') from error


def _trace(batch_size: int, program: Program, stream: Stream) -> None:
  shape = lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype)
  batch, state = jax.tree.map(shape, stream.batch(0)), program.abstract
  jax.eval_shape(program.eval_step, state.params, state.routing, batch)


def refusal(settings: Settings, error: Unsupported) -> BadInput:
  """One sentence with the key, its value and what is accepted."""
  name = settings.model.moe.implementation
  accepted = "accepted are 'auto', 'blocks', or what this says"
  return BadInput(f'model.moe.implementation={name!r}: {error}; {accepted}')
