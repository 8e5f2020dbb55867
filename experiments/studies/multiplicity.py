"""How many experts a token has: a question to routers whose experts choose."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from moejax.arrays import Assignment
from moejax.placement.routing_trace import routing_trace
from moejax.transformer import Decoder


def multiplicity(model: Decoder, batch: Mapping[str, np.ndarray], most: int) -> np.ndarray:
  """Shares `[most + 1]` of the real tokens of a batch with 0, 1, ... experts, over all mixtures."""
  inputs = {name: jnp.asarray(batch[name]) for name in ('positions', 'segment_ids')}
  mask = inputs['segment_ids'] > 0
  trace = routing_trace(model, jnp.asarray(batch['tokens']), mask=mask, **inputs)
  real = np.asarray(mask).reshape(-1)
  counts = np.zeros(most + 1)
  for one in trace:
    assert isinstance(one, Assignment)  # soft methods give every expert to every token
    counts += np.bincount(experts_by_token(one, real.size)[real], minlength=most + 1)
  return counts / counts.sum()


def experts_by_token(assignment: Assignment, num_tokens: int) -> np.ndarray:
  """How many rows each token has, `[T]`."""
  kept = np.asarray(assignment.expert) < assignment.num_experts
  return np.bincount(np.asarray(assignment.token)[kept], minlength=num_tokens)
