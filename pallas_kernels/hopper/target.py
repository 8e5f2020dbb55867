"""What the kernels are made for: an H100 or H200, or the simulation of one on a CPU."""

import contextlib
import contextvars
from typing import Literal, NamedTuple

from .. import chips

SMS = 132  # multiprocessors of an H100 or H200 (SXM)


class Target(NamedTuple):
  """How kernels are built.

  Attributes:
    blocks: persistent thread blocks, one a multiprocessor.
    gather: how rows at given indices come to shared memory: 'cp_async' on hardware; 'row_tma', a bulk copy a row,
      where inline machine instructions cannot be simulated.
    transposes: whether wgmma reads a transposed operand where it lies; the interpreter of jax 0.10.2 cannot.
    places: whether a kernel may say where values lie in registers; that interpreter knows no such places.
  """

  blocks: int
  gather: Literal['cp_async', 'row_tma']
  transposes: bool = True
  places: bool = True

  @property
  def inline(self) -> bool:
    """Whether kernels may hold machine instructions of their own."""
    return self.gather == 'cp_async'


HARDWARE = Target(SMS, 'cp_async')
_TARGET = contextvars.ContextVar('target', default=HARDWARE)


def current() -> Target:
  """The target of kernels that are traced now."""
  return _TARGET.get()


@contextlib.contextmanager
def simulated(blocks: int = 2):
  """Kernels traced inside run in Pallas' GPU interpreter, which looks for races; fresh memory holds NaN.

  For tests: what is compiled inside must not be used outside, nor the reverse, since jit does not see the difference.
  """
  from . import compat

  known = dict(transposes=compat.INTERPRETER_TRANSPOSES, places=compat.INTERPRETER_PLACES)
  token = _TARGET.set(Target(blocks, 'row_tma', **known))
  try:
    with chips.simulated(), compat.interpreter():
      yield
  finally:
    _TARGET.reset(token)
