"""Arrays that every device has whole."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

Array = jax.Array


def replicated(x: Array) -> Array:
  """x, whole on every device of its mesh, which the compiler otherwise cuts as it thinks best.

  For loops whose number of steps hangs on values: cut, every step waits for other devices. Without a mesh, inside of
  `shard_map` and with explicit axes x is what it is.
  """
  mesh = jax.typeof(x).sharding.mesh
  if mesh.empty or any(kind != AxisType.Auto for kind in mesh.axis_types):
    return x
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
