"""Scaling laws of dense models and mixtures of experts: frozen coefficients, and loss as a function of sizes.

Every law is called with keywords, `law(N=..., D=...)`, numbers or arrays that broadcast, and returns float64 losses in
nats a token. N is counted by each paper in its own way (accounting.py): the keyword has that paper's meaning.
"""

from __future__ import annotations

import dataclasses

import numpy as np

Numbers = np.ndarray | np.number | float | int
Floats = np.ndarray | np.float64


def effective_experts(E: Numbers, E_start: float, E_max: float) -> Floats:
  """Ehat, the number of experts with its ends bent: Ehat(1) = E_start, and Ehat -> E_max.

  1 / Ehat = 1 / (E - 1 + 1 / (1 / E_start - 1 / E_max)) + 1 / E_max (Clark et al. 2022, equation 5 of the text on
  unified laws; the same in Yun et al. 2024 and Ludziejewski et al. 2025).
  """
  offset = E_start * E_max / (E_max - E_start)  # 1 / (1 / E_start - 1 / E_max)
  return 1 / (1 / (_float(E) - 1 + offset) + 1 / E_max)


@dataclasses.dataclass(frozen=True)
class Chinchilla:
  """L = e + a / N^alpha + b / D^beta (Hoffmann et al. 2022, approach 3); N: all parameters, D: training tokens."""

  a: float
  alpha: float
  b: float
  beta: float
  e: float

  def __call__(self, *, N: Numbers, D: Numbers) -> Floats:
    return self.e + self.a / _float(N) ** self.alpha + self.b / _float(D) ** self.beta


@dataclasses.dataclass(frozen=True)
class FineGrained:
  """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, equation 9), of one expansion rate.

  N: ALL parameters of the experts and attention, without embedding, head and router (not the active ones); G:
  granularity, the hidden width of the dense layer over that of an expert. Of dense models g = 0.
  """

  a: float
  alpha: float
  b: float
  beta: float
  g: float
  gamma: float
  c: float

  def __call__(self, *, N: Numbers, D: Numbers, G: Numbers = 1) -> Floats:
    size = (self.g / _float(G) ** self.gamma + self.a) / _float(N) ** self.alpha
    return self.c + size + self.b / _float(D) ** self.beta


@dataclasses.dataclass(frozen=True)
class Joint:
  """L = a Ehat^delta N^(alpha + gamma ln Ehat) + b Ehat^omega D^(beta + zeta ln Ehat) + c.

  Ludziejewski et al. 2025, equation 5. Exponents alpha and beta are negative. N: ACTIVE parameters, with embedding and
  head.
  """

  a: float
  alpha: float
  delta: float
  gamma: float
  b: float
  beta: float
  omega: float
  zeta: float
  E_start: float
  E_max: float
  c: float

  def __call__(self, *, N: Numbers, D: Numbers, E: Numbers = 1) -> Floats:
    m, mu, n, nu = self.at(E)
    return m * _float(N) ** mu + n * _float(D) ** nu + self.c

  def at(self, E: Numbers) -> tuple[Floats, Floats, Floats, Floats]:
    """(m, mu, n, nu) of L = m N^mu + n D^nu + c, the Chinchilla form at this number of experts (table 4)."""
    effective = effective_experts(E, self.E_start, self.E_max)
    log = np.log(effective)
    return (
      self.a * effective**self.delta,
      self.alpha + self.gamma * log,
      self.b * effective**self.omega,
      self.beta + self.zeta * log,
    )


@dataclasses.dataclass(frozen=True)
class Clark:
  """log L = a log N + b log Ehat + c log N log Ehat + d, logarithms of base 10 (Clark et al. 2022, unified law).

  N: forward parameters of the dense equivalent. All runs have 130e9 tokens, so there is no D.
  """

  a: float
  b: float
  c: float
  d: float
  E_start: float
  E_max: float

  def __call__(self, *, N: Numbers, E: Numbers = 1) -> Floats:
    log_size = np.log10(_float(N))
    log_experts = np.log10(effective_experts(E, self.E_start, self.E_max))
    return 10 ** (
      self.a * log_size + self.b * log_experts + self.c * log_size * log_experts + self.d
    )

  def dense_size(self, *, N: Numbers, E: Numbers) -> Floats:
    """Nbar, the size of the dense model with the loss of (N, E): L(Nbar, 1) = L(N, E).

    Nbar = N^(A(Ehat) / A(E_start)) (Ehat / E_start)^(b / A(E_start)) with A(x) = a + c log10 x.
    """
    effective = effective_experts(E, self.E_start, self.E_max)
    slope, start = (self.a + self.c * np.log10(x) for x in (effective, self.E_start))
    return _float(N) ** (slope / start) * (effective / self.E_start) ** (self.b / start)


@dataclasses.dataclass(frozen=True)
class InferenceOptimal:
  """log L = log(a / N^alpha + b / Ehat^beta + c / D^gamma + f) + d log N log Ehat (Yun et al. 2024), natural logs.

  N: size of the dense counterpart. The paper prints no coefficients: they come from a fit to runs.
  """

  a: float
  alpha: float
  b: float
  beta: float
  c: float
  gamma: float
  f: float
  d: float
  E_start: float
  E_max: float

  def __call__(self, *, N: Numbers, D: Numbers, E: Numbers = 1) -> Floats:
    size, tokens = _float(N), _float(D)
    effective = effective_experts(E, self.E_start, self.E_max)
    terms = self.a / size**self.alpha + self.b / effective**self.beta + self.c / tokens**self.gamma
    return (terms + self.f) * np.exp(self.d * np.log(size) * np.log(effective))


Law = Chinchilla | FineGrained | Joint | Clark | InferenceOptimal

# Coefficients as printed. The constants of the replication and those of Clark et al. were compared with later
# papers that quote them, not with the first print.
CHINCHILLA = {
  'hoffmann': Chinchilla(a=406.4, alpha=0.34, b=410.7, beta=0.28, e=1.69),  # equation 10
  'besiroglu': Chinchilla(
    a=482.01, alpha=0.3478, b=2085.43, beta=0.3658, e=1.8172
  ),  # 2024, replication
}
# Krajewski et al. 2024
FINE_GRAINED = {
  'E=64': FineGrained(
    a=18.1, alpha=0.115, b=30.8, beta=0.147, g=2.1, gamma=0.58, c=0.47
  ),  # table 1
  'E=1': FineGrained(a=16.3, alpha=0.126, b=26.7, beta=0.127, g=0.0, gamma=0.0, c=0.47),  # table 1
  'E=64 without the best 20 %': FineGrained(  # table 5
    a=17.6, alpha=0.114, b=26.7, beta=0.140, g=2.07, gamma=0.570, c=0.472
  ),
  'E=16': FineGrained(  # table 8
    a=19.64, alpha=0.124, b=57.07, beta=0.169, g=1.18, gamma=0.986, c=0.472
  ),
}
JOINT = Joint(  # Ludziejewski et al. 2025, table 3
  a=35.91,
  alpha=-0.1889,
  delta=-0.2285,
  gamma=0.0098,
  b=35.98,
  beta=-0.1775,
  omega=0.5529,
  zeta=-0.0259,
  E_start=2.0732,
  E_max=290.4521,
  c=1.3637,
)
CLARK = {  # Clark et al. 2022, table of the unified law by router
  's-base': Clark(a=-0.082, b=-0.108, c=0.009, d=1.104, E_start=1.847, E_max=314.478),
  'rl-r': Clark(a=-0.083, b=-0.126, c=0.012, d=1.111, E_start=1.880, E_max=469.982),
  'hash': Clark(a=-0.087, b=-0.136, c=0.012, d=1.157, E_start=4.175, E_max=477.741),
}


def _float(value: Numbers) -> np.ndarray:
  return np.asarray(value, np.float64)
