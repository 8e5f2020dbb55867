"""Batches onto the mesh."""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh.make import BATCH_AXES


def batch_share(mesh: Mesh) -> tuple[int, int]:
  """(i, n): of every batch this process needs the i-th of n equal consecutive parts; (0, 1): all of it.

  It is the mesh that says so: processes along `tensor` need the same rows, and the processes of a pod need not lie
  along the batch in their order.
  """
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  places = NamedSharding(mesh, P(BATCH_AXES)).addressable_devices_indices_map((shards,))
  mine = sorted({where[0].indices(shards)[0] for where in places.values()})
  first, count = mine[0], len(mine)
  consecutive = mine == list(range(first, first + count))
  if not consecutive or first % count or shards % count:
    return 0, 1
  return first // count, shards // count


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's `batch_share` as shards of global arrays, the first axis over all axes of the batch."""
  index, count = batch_share(mesh)
  sharding = NamedSharding(mesh, P(BATCH_AXES))

  def place(value: np.ndarray) -> jax.Array:
    rows = len(value) * count

    def shard(where: tuple[slice, ...]) -> np.ndarray:
      start, stop, _ = where[0].indices(rows)
      return value[start - index * len(value) : stop - index * len(value)]

    return jax.make_array_from_callback((rows, *value.shape[1:]), sharding, shard)

  return {key: place(value) for key, value in batch.items()}
