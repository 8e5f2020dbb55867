"""Which compiler a test meets, where its choices differ by version."""

import importlib.metadata


def libtpu() -> tuple[int, ...]:
  """The version of the TPU's compiler: `(0, 0, 50)` or more is that of jax 0.12."""
  numbers = importlib.metadata.version('libtpu').split('.')
  return tuple(int(number) for number in numbers[:3])
