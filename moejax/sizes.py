"""Arguments that every constructor of the library takes, checked where a user gives them."""

from __future__ import annotations

import numbers
from typing import Any

from flax import nnx


def check_made_of(rngs: Any, **sizes: Any) -> None:
  """Raises ValueError for sizes that are no integers from 1, and for keys that are no nnx.Rngs."""
  for key, value in sizes.items():
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
      raise ValueError(f'{key}={value!r}: accepted are integers from 1')
  if not isinstance(rngs, nnx.Rngs):
    raise ValueError(
      f'rngs of type {type(rngs).__name__}: accepted is flax.nnx.Rngs, as in nnx.Rngs(0)'
    )
