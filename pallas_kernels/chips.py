"""Which chips the bodies are for, and a refusal of all others where the chip is known before anything is lowered."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from .errors import Unsupported


class Made(NamedTuple):
  """What a body needs of a device.

  Attributes:
    platform: as devices name it, which calls every GPU 'gpu'.
    capabilities: of NVIDIA's instruction sets those that it is compiled to; None: any.
    kinds: parts of the names of chips that have it, for devices of which no more is known.
    text: the same in words.
  """

  platform: str
  capabilities: tuple[str, ...] | None
  kinds: tuple[str, ...]
  text: str


HOPPER = ('H100', 'H200', 'H800', 'H20')
AMPERE = ('A100', 'A800', 'A10', 'A30', 'A40', 'RTX A', 'GeForce RTX 30')
ADA = ('L4', 'L20', 'Ada', 'GeForce RTX 40')
EIGHT = 'an NVIDIA GPU of compute capability 8.0 to 8.9 (A100, L40S)'
# Instructions of sm_90a exist on no other generation, older or newer; before it Mosaic copies in another way. Every
# other body is of XLA's operations.
MADE_FOR = {
  'ampere': Made('gpu', ('8.0', '8.6', '8.7', '8.9'), AMPERE + ADA, EIGHT),
  'gpu': Made('gpu', ('9.0',), HOPPER, 'an NVIDIA GPU of compute capability 9.0 (H100, H200)'),
  'tpu': Made('tpu', None, (), 'a TPU'),
}
_SIMULATED = contextvars.ContextVar('simulated', default=False)


@contextlib.contextmanager
def simulated() -> Iterator[None]:
  """For tests: inside, an interpreter stands for the chips, so that a body may run on any device."""
  token = _SIMULATED.set(True)
  try:
    yield
  finally:
    _SIMULATED.reset(token)


def check_device(operation: str, implementation: str, device: Any) -> None:
  """Refuses a body on a device that has not the instructions it is made of.

  Args:
    operation: for the message.
    implementation: the body's name.
    device: a device, of this machine or only described, or a `jax.sharding.AbstractDevice`.

  Raises:
    Unsupported: with the kind of the device.
  """
  made = MADE_FOR.get(implementation)
  if made is not None and not _may_run(made, device):
    capability = getattr(device, 'compute_capability', None)
    what = f'{device.device_kind} ({device.platform}{f" {capability}" if capability else ""})'
    raise Unsupported(
      f'{operation}: implementation={implementation!r} needs {made.text}, not {what}'
    )


def _may_run(made: Made, device: Any) -> bool:
  if device.platform != made.platform:
    return False
  if made.capabilities is None:
    return True
  # 9.0 and no other: what is made for sm_90a does not run on sm_100.
  known = getattr(device, 'compute_capability', None)
  return known in made.capabilities if known else any(k in device.device_kind for k in made.kinds)


def check(operation: str, implementation: str, args: Any) -> None:
  """Refuses a body asked for by name where its chip is known to be another.

  It is known where the arrays have values, and from the mesh around what is traced if its devices are accelerators: a
  process that has CPUs alone may be tracing for others. Of anything else the lowering tells.

  Raises:
    Unsupported: see `check_device`.
  """
  if implementation not in MADE_FOR or _SIMULATED.get():
    return
  around = jax.sharding.get_abstract_mesh().abstract_device
  devices = set() if around is None or around.platform == 'cpu' else {around}
  arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
  if not any(isinstance(x, jax.core.Tracer) for x in arrays):
    devices |= {device for x in arrays for device in x.devices()}
  for device in devices:
    check_device(operation.rpartition('.')[2], implementation, device)
