"""Inter-layer affinity: experts that follow each other on one device (ExFlow, Yao et al. 2024).

With w[l, i, j] tokens that go from expert i of layer l to expert j of layer l + 1, and every device holding E / P
experts of each layer, the placement minimises the crossings

  sum over l, i, j of w[l, i, j] [device(l, i) != device(l + 1, j)].

ExFlow writes the sum over sampled tokens; both are the same, for the cost of a path is the sum over its steps. Small
problems are solved as integer programs; large ones, which ExFlow cuts into nodes and then devices, here by taking
layers in turn: a layer between two that stay is an assignment problem, which is solved exactly.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linear_sum_assignment, milp
from scipy.sparse import lil_matrix

Placement = np.ndarray
"""int `[L, E]`: the device of each expert."""

EXACT = 100
"""Integer variables up to which 'auto' solves exactly."""


def identity_placement(num_layers: int, num_experts: int, num_devices: int) -> Placement:
  """Experts in their own order: what a mesh does.

  Raises:
    ValueError: experts that do not divide over the devices.
  """
  if num_devices < 1 or num_experts % num_devices:
    raise ValueError(f'num_experts={num_experts} does not divide over num_devices={num_devices}')
  one = np.arange(num_experts) // (num_experts // num_devices)
  return np.tile(one, (num_layers, 1))


def crossings(weights: np.ndarray, placement: Placement) -> float:
  """Fraction of the transitions `weights` `[L - 1, E, E]` whose ends lie on different devices."""
  apart = placement[:-1, :, None] != placement[1:, None, :]
  total = weights.sum()
  return float((weights * apart).sum() / total) if total else 0.0


def affinity_placement(
  weights: np.ndarray, num_devices: int, *, method: str = 'auto', seed: int = 0
) -> Placement:
  """The placement with the fewest crossings that is found.

  Args:
    weights: `[L - 1, E, E]`, see `moejax.placement.traces.transitions`.
    num_devices: P.
    method: 'exact', 'local', or 'auto': exact for small problems.
    seed: of the starts of the local search.

  Raises:
    ValueError: experts that do not divide over the devices, or an unknown method.
  """
  layers, num_experts, _ = weights.shape
  identity_placement(layers + 1, num_experts, num_devices)
  if method not in ('auto', 'exact', 'local'):
    raise ValueError(f"method={method!r}: accepted are 'auto', 'exact', 'local'")
  if num_devices == 1:
    return np.zeros((layers + 1, num_experts), int)
  small = (layers + 1) * num_experts * num_devices <= EXACT
  if method == 'exact' or (method == 'auto' and small):
    return solve_exactly(weights, num_devices)
  return solve_locally(weights, num_devices, seed=seed)


def solve_exactly(weights: np.ndarray, num_devices: int, *, seconds: float = 60.0) -> Placement:
  """By scipy's integer solver: x[l, e, p] says that expert e of layer l is on device p, y[l, i, j] that i, j are apart.

  Raises:
    RuntimeError: no placement was found in the time.
  """
  steps, num_experts, _ = weights.shape
  layers, own = steps + 1, num_experts // num_devices
  x = np.arange(layers * num_experts * num_devices).reshape(layers, num_experts, num_devices)
  edges = list(zip(*np.nonzero(weights), strict=True))
  size = x.size + len(edges)
  rows: list[tuple[dict[int, float], float, float]] = []
  for layer, expert in itertools.product(range(layers), range(num_experts)):
    rows.append(({int(v): 1.0 for v in x[layer, expert]}, 1.0, 1.0))
  for layer, device in itertools.product(range(layers), range(num_devices)):
    rows.append(({int(v): 1.0 for v in x[layer, :, device]}, own, own))
  for number, (layer, i, j) in enumerate(edges):
    for device in range(num_devices):  # y >= x_i - x_j
      here, there = int(x[layer, i, device]), int(x[layer + 1, j, device])
      rows.append(({x.size + number: 1.0, here: -1.0, there: 1.0}, 0.0, np.inf))
  matrix = lil_matrix((len(rows), size))
  for row, (terms, _, _) in enumerate(rows):
    for column, value in terms.items():
      matrix[row, column] = value
  lower, upper = np.zeros(size), np.ones(size)
  lower[x[0, 0, 0]] = 1.0  # devices are alike: the first expert lies on the first
  result = milp(
    np.concatenate([np.zeros(x.size), [weights[edge] for edge in edges]]),
    constraints=LinearConstraint(
      matrix.tocsr(), [row[1] for row in rows], [row[2] for row in rows]
    ),
    bounds=Bounds(lower, upper),
    integrality=np.concatenate([np.ones(x.size), np.zeros(len(edges))]),
    options={'time_limit': seconds},
  )
  if result.x is None:
    raise RuntimeError(f'no placement in {seconds} s: {result.message}')
  return result.x[: x.size].reshape(x.shape).argmax(-1)


def solve_locally(
  weights: np.ndarray, num_devices: int, *, starts: int = 8, seed: int = 0
) -> Placement:
  """The best of several descents, the first from the order that is there, the others from random ones."""
  steps, num_experts, _ = weights.shape
  rng = np.random.default_rng(seed)
  first = identity_placement(steps + 1, num_experts, num_devices)
  best, fewest = first, crossings(weights, first)
  for start in range(starts):
    placement = first if start == 0 else rng.permuted(first, axis=1)
    placement = descend(weights, placement.copy(), num_devices)
    found = crossings(weights, placement)
    if found < fewest:
      best, fewest = placement, found
  return best


def descend(weights: np.ndarray, placement: Placement, num_devices: int) -> Placement:
  """Layers in turn, each the best there is between its neighbours, until none changes."""
  slots = np.repeat(np.arange(num_devices), placement.shape[1] // num_devices)
  before = np.inf
  while crossings(weights, placement) < before - 1e-12:
    before = crossings(weights, placement)
    for layer in range(len(placement)):
      stays = _stays(weights, placement, layer, num_devices)
      experts, chosen = linear_sum_assignment(stays[:, slots], maximize=True)
      placement[layer, experts] = slots[chosen]
  return placement


def _stays(weights: np.ndarray, placement: Placement, layer: int, num_devices: int) -> np.ndarray:
  """`[E, P]`: transitions of each expert that stay on the device if it lies there."""
  on = np.eye(num_devices)
  found = np.zeros((placement.shape[1], num_devices))
  if layer > 0:
    found += weights[layer - 1].T @ on[placement[layer - 1]]
  if layer < len(placement) - 1:
    found += weights[layer] @ on[placement[layer + 1]]
  return found
