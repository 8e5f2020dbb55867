"""How an operation finds its body: by name, or by the platform that is lowered for.

A body is a module of the operation's package, `cpu.py` say, with `forward` and `backward`. It is imported when it
is first wanted, so that nobody loads a compiler of a platform that he does not use.
"""

import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from . import chips
from .errors import Unsupported as Unsupported

# What `implementation=None` takes on a platform; every other platform takes DEFAULT, and so does one whose body cannot
# do what is asked. A body enters here when its speed has been measured on that platform: an interpreter and a compiler
# show neither speed nor, of a GPU, the order of memory accesses. And all bodies that stand here are traced into every
# program, whatever it is lowered for. 'cuda' is every NVIDIA GPU, those of sm_80 too, which take DEFAULT.
BY_PLATFORM = {'cpu': 'cpu'}
DEFAULT = 'blocks'


def check_name(operation: str, implementation: str | None, names) -> None:
  """Refuses names that `operation` does not have.

  Raises:
    ValueError: `implementation` is neither None nor one of `names`.
  """
  if implementation is not None and implementation not in names:
    listed = ', '.join(repr(name) for name in sorted(names))
    raise ValueError(
      f'implementation={implementation!r} of {operation} does not exist: use None or one of {listed}'
    )


def check_dtypes(operation: str, **arrays) -> None:
  """Refuses dtypes that the bodies would compute wrongly or not at all.

  Raises:
    Unsupported: an array is not of a floating type of 16 bits or more.
  """
  for name, array in arrays.items():
    if array is not None and not (
      jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize >= 2
    ):
      raise Unsupported(
        f'{operation}: {name} is {array.dtype}; bfloat16, float16, float32 and float64 are supported'
      )


def run(operation: str, part: str, implementation: str | None, *args, **options):
  """Calls `part` ('forward', 'backward') of one body of the package `operation`.

  It is the body of that name; for None, the one for the platform that is lowered for, or DEFAULT where that one raises
  Unsupported, and then all bodies return the same types. A body whose backward reads what its forward has saved raises
  in both or in neither.

  Raises:
    Unsupported: of the body of that name; or the chip is known to be another than it is made for (chips.check).
  """
  body = lambda name: functools.partial(_function(operation, name, part), **options)
  if implementation is not None:
    chips.check(operation, implementation, args)
    return body(implementation)(*args)
  chosen = {platform: _or_else(body(name), body(DEFAULT)) for platform, name in BY_PLATFORM.items()}
  return jax.lax.platform_dependent(*args, default=body(DEFAULT), **chosen)


def _or_else(body, other):
  def call(*args):
    try:
      return body(*args)
    except Unsupported:
      return other(*args)

  return call


def largest(operation: str, function: str, implementation: str | None, *args) -> int:
  """The largest `function(*args)` of the bodies that `run` may take: a size that all of them can do with."""
  names = {DEFAULT, *BY_PLATFORM.values()} if implementation is None else {implementation}
  return max(_function(operation, name, function)(*args) for name in names)


def _function(operation: str, name: str, part: str) -> Callable:
  return getattr(importlib.import_module(f'{operation}.{name}'), part)


def accumulator(*arrays: jax.Array) -> jnp.dtype:
  """The type in which sums are kept: float64 if any array has it, else float32."""
  wide = any(array.dtype == jnp.dtype('float64') for array in arrays)
  return jnp.dtype('float64' if wide else 'float32')
