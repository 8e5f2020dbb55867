"""What a layer reports about its routing, from `RoutingStats`."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from moejax.arrays import RoutingStats


def routing_metrics(stats: RoutingStats) -> dict[str, Array]:
  """Scalars and `[E]` vectors.

  Returns:
    load: `[E]`, fraction of the rows that each expert worked on.
    weight: `[E]`, fraction of the combine weight.
    max_load: largest load over the mean one; 1 is perfect balance.
    entropy: mean entropy of the router's probabilities, in nats.
    dropped: fraction of the wanted rows that found no place, at an expert or on their way to it.
    lost: fraction of them that found none on their way, in an exchange between devices.
    unrouted: fraction of the tokens that no expert worked on.
  """
  load_e = stats.kept_e / jnp.maximum(stats.kept_e.sum(), 1)
  wanted = stats.chosen_e.sum()
  tokens = jnp.maximum(stats.tokens, 1)
  return {
    'load': load_e,
    'weight': stats.weight_e / jnp.maximum(stats.weight_e.sum(), 1e-20),
    'max_load': load_e.max() * jnp.asarray(load_e.shape[0], load_e.dtype),
    'entropy': stats.entropy / tokens,
    'dropped': (wanted - stats.kept_e.sum()) / jnp.maximum(wanted, 1),
    'lost': jnp.zeros_like(wanted) if stats.lost is None else stats.lost / jnp.maximum(wanted, 1),
    'unrouted': stats.unrouted / tokens,
  }
