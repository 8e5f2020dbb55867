"""Batches onto the mesh."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh.make import BATCH_AXES


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows as shards of global arrays, the first axis over all mesh axes."""
  sharding = NamedSharding(mesh, P(BATCH_AXES))
  return {
    key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
  }
