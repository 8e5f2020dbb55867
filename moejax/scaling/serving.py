"""The cost of serving a mixture, and over-trained models that trade it for training compute (Yun et al. 2024)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Real = float | int
Latency = Callable[[float, int], float]


@dataclasses.dataclass(frozen=True)
class Server:
  """Identical GPUs and the requests they serve.

  Attributes:
    memory: elements (bytes / 2 in bfloat16) that one GPU holds, M0.
    price: of one GPU a second, C0.
    prompt, output: mean tokens of a request, p and n.
    kv_coefficient: mu of h l = mu N^(2/3), the width times the layers of the dense counterpart.
    latency: (batch, GPUs) -> seconds that a batch takes, prompt and output; the papers' come from profiles.
  """

  memory: Real
  price: Real
  prompt: Real
  output: Real
  kv_coefficient: Real
  latency: Latency


def total_parameters(N: Real, E: Real) -> float:
  """N_MoE = (1 + (E - 1) / 3) N: FFN are two thirds of N, half of the layers are mixtures."""
  return (1 + (E - 1) / 3) * N


def largest_batch(server: Server, N: Real, E: Real, gpus: int) -> float:
  """b = (G M0 - N_MoE) / ((2 p + n) h l); not positive where the weights alone do not fit."""
  left = gpus * server.memory - total_parameters(N, E)
  cached = (2 * server.prompt + server.output) * server.kv_coefficient * N ** (2 / 3)
  return left / cached


def cost_per_request(server: Server, N: Real, E: Real, max_gpus: int = 64) -> float:
  """G C0 / T(G) with throughput T = b / latency(b, G), at the number of GPUs where it is least.

  Raises:
    ValueError: the weights do not fit on `max_gpus`.
  """
  costs = []
  for gpus in range(1, max_gpus + 1):
    batch = largest_batch(server, N, E, gpus)
    if batch >= 1:
      costs.append(gpus * server.price * server.latency(batch, gpus) / batch)
  if not costs:
    raise ValueError(
      f'max_gpus={max_gpus} hold no mixture of N={N:g}, E={E:g} with a request: accepted is more'
    )
  return min(costs)


def bounded_loss(
  loss: Callable[[float, float], float], target: Real, flops: Real, largest: Real
) -> float:
  """The smallest N whose loss is `target` when the FLOPs all go into training it on flops / (6 N) tokens.

  Args:
    loss: (N, D) -> loss at the number of experts in question.
    target: such as the loss of another number of experts at its optimum.
    flops: B.
    largest: N of the least loss at this budget; from there down, loss only grows.

  Raises:
    ValueError: even `largest` does not reach the target.
  """
  if loss(largest, flops / (6 * largest)) > target:
    raise ValueError(
      f'target={target:.4f} is below the best loss {loss(largest, flops / (6 * largest)):.4f} of flops={flops:g}: '
      'accepted is a loss from there on'
    )
  return _bisect(lambda N: loss(N, flops / (6 * N)) - target, largest * 1e-6, largest)


def bounded_cost(cost: Callable[[float], float], bound: Real, largest: Real) -> float:
  """The largest N up to `largest` whose cost of serving, rising with N, stays within `bound`.

  Raises:
    ValueError: no size does.
  """
  if cost(largest) <= bound:
    return largest
  if cost(largest * 1e-6) > bound:
    raise ValueError(f'bound={bound:g} is below the cost of any size: accepted is more')
  return _bisect(lambda N: bound - cost(N), largest * 1e-6, largest)


def _bisect(f: Callable[[float], float], low: Real, high: Real) -> float:
  """Where f changes its sign, in the logarithm."""
  sign = f(low) > 0
  for _ in range(80):
    middle = float(np.sqrt(low * high))
    low, high = (middle, high) if (f(middle) > 0) == sign else (low, middle)
  return float(np.sqrt(low * high))
