"""Routing traces as arrays: which experts each token chose in each layer, and how often one follows another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moejax.arrays import Assignment, SoftPlan

Choices = np.ndarray
"""int `[T, L, K]`: the experts of a token in every mixture; `num_experts` where none was chosen."""


def choices_of(trace: Sequence[Assignment | SoftPlan]) -> Choices:
  """The choices `[T, L, K]` of a trace (moejax/placement/routing_trace.py) of token-choice routers.

  Raises:
    ValueError: no layer, a layer that is not of token choice, or layers of unlike sizes.
  """
  if not trace:
    raise ValueError('trace=[]: accepted is one assignment or more')
  layers: list[np.ndarray] = []
  experts = set()
  for layer, assignment in enumerate(trace):
    if not isinstance(assignment, Assignment):
      raise ValueError(f'layer {layer} of the trace is no assignment of tokens to experts')
    token = np.asarray(assignment.token)
    num_tokens = int(token.max()) + 1
    k = token.size // num_tokens
    if token.size % num_tokens or (token != np.repeat(np.arange(num_tokens), k)).any():
      raise ValueError(
        f'layer {layer} of the trace is not token-major: accepted is token choice, K rows a token'
      )
    experts.add(assignment.num_experts)
    layers.append(np.asarray(assignment.chosen).reshape(num_tokens, k))
  if len(experts) > 1 or len({layer.shape for layer in layers}) > 1:
    raise ValueError('layers of the trace differ in tokens, choices or experts')
  return np.stack(layers, axis=1)


def transitions(choices: Choices, num_experts: int) -> np.ndarray:
  """`[L - 1, E, E]`: how often a token with expert i in a layer has expert j in the next, over all K * K pairs."""
  if choices.shape[1] < 2:
    raise ValueError('a trace of one layer has no transitions: accepted are two mixtures or more')
  counts = np.zeros((choices.shape[1] - 1, num_experts + 1, num_experts + 1))
  for layer in range(choices.shape[1] - 1):
    for first in choices[:, layer].T:
      for second in choices[:, layer + 1].T:
        np.add.at(counts[layer], (first, second), 1)
  return counts[:, :num_experts, :num_experts]


def loads(choices: Choices, num_experts: int) -> np.ndarray:
  """`[L, E]`: rows of each expert."""
  count = [
    np.bincount(layer.ravel(), minlength=num_experts + 1) for layer in choices.swapaxes(0, 1)
  ]
  return np.stack(count)[:, :num_experts]
