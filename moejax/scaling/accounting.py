"""Parameters and FLOPs as the papers count them; what our own models have is in ours.py.

The counts of a family of models are functions of its width d, with d / 64 blocks of it: fractions are meant, for
they describe a curve through the models and not one of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from moejax.scaling.laws import Floats, Numbers

VOCABULARY = 50257  # of GPT-2
HEAD_DIM = 64


@dataclasses.dataclass(frozen=True)
class Counts:
  """Of one model, or of arrays of them.

  Attributes:
    N: the size that the paper's law takes.
    active, total: parameters that work on a token, and all; what is left out is the paper's choice.
    stored: parameters that lie in memory, embedding and head among them.
    training_flops, inference_flops: a token.
    cached: elements of keys and values a token of context.
  """

  N: Floats
  active: Floats
  total: Floats
  stored: Floats
  training_flops: Floats
  inference_flops: Floats
  cached: Floats


Count = Callable[..., Counts]


def dense(d: Numbers, E: Numbers = 1, G: Numbers = 1) -> Counts:
  """12 d^2 a block (Hoffmann et al. 2022 as others read it): N = all of them, 6 N FLOPs a token of training."""
  d = np.asarray(d, np.float64)
  blocks = d / HEAD_DIM
  size = 12 * d**2 * blocks
  return Counts(size, size, size, size + 2 * d * VOCABULARY, 6 * size, 2 * size, 2 * blocks * d)


def fine_grained(d: Numbers, E: Numbers, G: Numbers = 1) -> Counts:
  """Krajewski et al. 2024, section 5 and appendix: FFN of 4 d without gate, embedding, head and router left out.

  Training: (12 d^2 c_f + d E G c_r) a block and token with c_f = 6 and c_r = 14; a forward pass has a third of c_f
  and 6 of c_r (router, dispatch, combine). A single expert, E = G = 1, is the dense model and has no router. N of the
  law is the total.
  """
  d, E, G = (np.asarray(value, np.float64) for value in (d, E, G))
  blocks, routed = d / HEAD_DIM, np.where(E * G == 1, 0, E * G)
  active, total = 12 * d**2 * blocks + 0 * E, d**2 * (8 * E + 4) * blocks
  return Counts(
    N=total,
    active=active,
    total=total,
    stored=total + 2 * d * VOCABULARY,
    training_flops=(12 * d**2 * 6 + d * routed * 14) * blocks,
    inference_flops=(12 * d**2 * 2 + d * routed * 6) * blocks,
    cached=2 * blocks * d,
  )


def fine_grained_by_active(d: Numbers, E: Numbers, G: Numbers = 1) -> Counts:
  """The same models for laws whose N is active: fits to tables that leave out the embedding (experiments/fit.py)."""
  counts = fine_grained(d, E, G)
  return dataclasses.replace(counts, N=counts.active)


def joint(d: Numbers, E: Numbers, G: Numbers = 1) -> Counts:
  """Ludziejewski et al. 2025: SwiGLU of 3 d, embedding and head counted, routing FLOPs ignored; N is active."""
  d, E = (np.asarray(value, np.float64) for value in (d, E))
  blocks, ends = d / HEAD_DIM, 2 * d * VOCABULARY
  active, total = ends + 13 * blocks * d**2 + 0 * E, ends + (4 + 9 * E) * blocks * d**2
  return Counts(active, active, total, total, 6 * active, 2 * active, 2 * blocks * d)


def inference_optimal(d: Numbers, E: Numbers, G: Numbers = 1) -> Counts:
  """Yun et al. 2024: mixtures in every second layer, FFN two thirds of N, so all are (1 + (E - 1) / 3) N.

  N, active and FLOPs are those of the dense counterpart, as the paper has them; the second expert of top-2 is not
  counted.
  """
  base = dense(d)
  total = (1 + (np.asarray(E, np.float64) - 1) / 3) * base.N
  return dataclasses.replace(base, total=total, stored=base.stored + total - base.N)


COUNTS: dict[str, Count] = {
  'chinchilla': dense,
  'fine_grained': fine_grained,
  'inference_optimal': inference_optimal,
  'joint': joint,
}
"""Short name of a law -> how its paper counts."""


def fine_grained_width(active: Numbers) -> Floats:
  """d of so many active parameters 12 d^2 n with n = d / 64 (Krajewski et al. 2024)."""
  return np.cbrt(np.asarray(active, np.float64) * HEAD_DIM / 12)


def joint_learning_rate(d: Numbers, num_blocks: Numbers, E: Numbers) -> Floats:
  """Peak learning rate of Ludziejewski et al. 2025, with the constants of their code.

  exp(8.391640956 - 0.812179824 ln N - 0.25 ln E). The paper's text says that N is active and without embedding; their
  code adds the embedding (not the head), and only that falls inside the rates they searched. So do we.
  """
  d = np.asarray(d, np.float64)
  size = 13 * num_blocks * d**2 + d * VOCABULARY
  return np.exp(8.391640956 - 0.812179824 * np.log(size) - 0.25 * np.log(E))


def inference_optimal_learning_rate(N: Numbers) -> Floats:
  """Peak learning rate of Yun et al. 2024: 0.003239 - 0.0001395 ln N."""
  return 0.003239 - 0.0001395 * np.log(np.asarray(N, np.float64))


def zettaflops(
  *,
  num_layers: int,
  d_model: int,
  tokens: float,
  moe: bool = False,
  sequence_length: int = 2048,
  vocab_size: int = VOCABULARY,
) -> float:
  """Training cost in 1e21 FLOPs with recomputed activations (Artetxe et al. 2021, appendix).

  96 L h^2 (1 + s / (6 h) + V / (16 L h)) a token; with top-2 mixtures in every second layer 4/3 stands for the 1. With
  the vocabulary of GPT-2 costs agree with their table to its last digit; with 51200, padded, they do not.
  """
  attention = sequence_length / (6 * d_model)
  head = vocab_size / (16 * num_layers * d_model)
  layers = 4 / 3 if moe else 1
  return 96 * num_layers * d_model**2 * (layers + attention + head) * tokens / 1e21


def cost_at(value: float, costs: np.ndarray, values: np.ndarray) -> float:
  """Training cost at which a family of models reaches `value` of a metric (Artetxe et al. 2021, section 4).

  Linear in the metric and logarithmic in the cost between the two runs that bracket the value.

  Args:
    value: of the metric, perplexity or accuracy.
    costs: `[N]`, of the family's runs.
    values: `[N]`, of the metric; strictly falling or strictly rising with the cost.

  Raises:
    ValueError: fewer than two runs, values that do not follow the cost, or a value outside of them: no extrapolation.
  """
  order = np.argsort(costs)
  costs = np.asarray(costs, np.float64)[order]
  values = np.asarray(values, np.float64)[order]
  steps = np.diff(values)
  if len(values) < 2 or not (np.all(steps > 0) or np.all(steps < 0)):
    raise ValueError(
      f'values={values.tolist()} in the order of cost: accepted are two or more that only fall or only rise'
    )
  if not values.min() <= value <= values.max():
    raise ValueError(
      f'value={value} is outside of the runs, and nothing is extrapolated: accepted is {values.min():g} to '
      f'{values.max():g}'
    )
  if steps[0] < 0:
    costs, values = costs[::-1], values[::-1]
  return float(np.exp(np.interp(value, values, np.log(costs))))


def speed_up(
  value: float,
  *,
  dense_costs: np.ndarray,
  dense_values: np.ndarray,
  moe_costs: np.ndarray,
  moe_values: np.ndarray,
) -> float:
  """How many times less compute mixtures need than dense models to reach `value`; see `cost_at`."""
  return cost_at(value, dense_costs, dense_values) / cost_at(value, moe_costs, moe_values)
