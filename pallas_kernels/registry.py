"""How an operation finds its body: by name, or by the platform that is lowered for."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

# What `implementation=None` takes on a platform; every other platform takes DEFAULT.
BY_PLATFORM = {'cpu': 'cpu'}
DEFAULT = 'blocks'


class Unsupported(NotImplementedError):
  """This implementation cannot do what is asked; raised while tracing, before anything runs."""


class Body(NamedTuple):
  """One implementation of an operation; all bodies of an operation save the same residuals."""

  forward: Callable
  backward: Callable


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


def run(functions: Mapping[str, Callable], implementation: str | None, *args):
  """Calls the function of that name; for None, the one for the platform that is lowered for."""
  if implementation is not None:
    return functions[implementation](*args)
  chosen = {platform: functions[name] for platform, name in BY_PLATFORM.items()}
  return jax.lax.platform_dependent(*args, default=functions[DEFAULT], **chosen)


def accumulator(*arrays: jax.Array) -> jnp.dtype:
  """The type in which sums are kept: float64 if any array has it, else float32."""
  wide = any(array.dtype == jnp.dtype('float64') for array in arrays)
  return jnp.dtype('float64' if wide else 'float32')
