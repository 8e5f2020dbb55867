"""Options of XLA's compiler that a config gives for the training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from experiments.errors import BadInput


def check_compiler(options: Mapping[str, Any]) -> None:
  """Compiles next to nothing with them: each platform has options of its own, and tells them only so.

  Raises:
    BadInput: an option that the compiler of this machine's devices does not have, or not with this value.
  """
  for name, value in options.items():
    try:
      jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
    except (TypeError, jax.errors.JaxRuntimeError) as error:
      raise BadInput(
        f"compiler.{name}={value!r} is not accepted: it must be an option of XLA's compiler for "
        f'{jax.devices()[0].platform}, and a value that it takes'
      ) from error
