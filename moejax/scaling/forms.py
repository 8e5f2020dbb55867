"""The laws as sums of exponentials that are linear in their coefficients: what a fit needs to know of each.

With additive coefficients in logarithms, every law is L = sum over j of exp(X_j theta), where X_j `[runs,
coefficients]` is made of logarithms of N, D, G and Ehat. So one fit serves all, with an exact gradient.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from moejax.scaling.laws import Chinchilla, Clark, FineGrained, InferenceOptimal, Joint, Law

Logs = Mapping[str, np.ndarray]  # of N, D, G and Ehat, each [runs]
Terms = list[dict[str, np.ndarray]]  # for each exponential: coefficient -> what it is multiplied by


@dataclasses.dataclass(frozen=True)
class Form:
  """One law to be fitted.

  Attributes:
    law: its dataclass.
    columns: keywords of its call.
    terms: logs -> exponents of the exponentials; linear in log Ehat.
    scales: coefficients that are positive and fitted in logarithms, one for each exponential.
    exponents: starting values of the others.
    delta: residuals up to here count quadratically, beyond linearly (Huber), as in the paper.
    on_log: residuals are those of log loss.
    least: how many different values of each column it takes.
  """

  law: type[Law]
  columns: tuple[str, ...]
  terms: Callable[[Logs], Terms]
  scales: tuple[str, ...]
  exponents: Mapping[str, tuple[float, ...]]
  delta: float
  on_log: bool
  least: Mapping[str, int]

  @property
  def names(self) -> tuple[str, ...]:
    """Coefficients in the order of the law's dataclass."""
    return tuple(field.name for field in dataclasses.fields(self.law))

  @property
  def linear(self) -> tuple[str, ...]:
    """Those in which the exponents are linear: all but the ends of Ehat."""
    return tuple(name for name in self.names if name not in ('E_start', 'E_max'))

  @property
  def bends(self) -> bool:
    """Whether the law sees experts through Ehat."""
    return 'E_start' in self.names

  def points_needed(self, hold_out: float = 0.0) -> int:
    """Runs for one more than the coefficients after a fraction was held out."""
    return math.ceil((len(self.names) + 1) / (1 - hold_out) - 1e-9)

  def starts(self) -> Iterator[dict[str, float]]:
    """Starting values of all but the scales, which follow from them by least squares."""
    for values in itertools.product(*self.exponents.values()):
      yield dict(zip(self.exponents, values, strict=True))


def _chinchilla(x: Logs) -> Terms:
  one = np.ones_like(x['N'])
  return [{'a': one, 'alpha': -x['N']}, {'b': one, 'beta': -x['D']}, {'e': one}]


def _fine_grained(x: Logs) -> Terms:
  one = np.ones_like(x['N'])
  return [
    {'g': one, 'gamma': -x['G'], 'alpha': -x['N']},
    {'a': one, 'alpha': -x['N']},
    {'b': one, 'beta': -x['D']},
    {'c': one},
  ]


def _joint(x: Logs) -> Terms:
  one, experts = np.ones_like(x['N']), x['Ehat']
  return [
    {'a': one, 'delta': experts, 'alpha': x['N'], 'gamma': x['N'] * experts},
    {'b': one, 'omega': experts, 'beta': x['D'], 'zeta': x['D'] * experts},
    {'c': one},
  ]


def _clark(x: Logs) -> Terms:
  ten = math.log(10.0)
  return [
    {
      'a': x['N'],
      'b': x['Ehat'],
      'c': x['N'] * x['Ehat'] / ten,
      'd': np.full_like(x['N'], ten),
    }
  ]


def _inference_optimal(x: Logs) -> Terms:
  one, both = np.ones_like(x['N']), {'d': x['N'] * x['Ehat']}
  return [
    {'a': one, 'alpha': -x['N'], **both},
    {'b': one, 'beta': -x['Ehat'], **both},
    {'c': one, 'gamma': -x['D'], **both},
    {'f': one, **both},
  ]


_ENDS = {'E_start': (2.0,), 'E_max': (100.0, 400.0)}
_POWERS = (0.05, 0.15, 0.3, 0.5, 0.8)

FORMS: dict[str, Form] = {
  'chinchilla': Form(
    Chinchilla,
    ('N', 'D'),
    _chinchilla,
    scales=('a', 'b', 'e'),
    exponents={'alpha': _POWERS, 'beta': _POWERS},
    delta=1e-3,
    on_log=True,
    least={'N': 3, 'D': 3},
  ),
  'clark': Form(
    Clark,
    ('N', 'E'),
    _clark,
    scales=(),
    exponents={'a': (-0.1,), 'b': (-0.1,), 'c': (0.0,), 'd': (1.0,), **_ENDS},
    delta=1e-2,
    on_log=True,
    least={'N': 3, 'E': 3},
  ),
  'fine_grained': Form(
    FineGrained,
    ('N', 'D', 'G'),
    _fine_grained,
    scales=('a', 'b', 'g', 'c'),
    exponents={'alpha': _POWERS, 'beta': _POWERS, 'gamma': (0.3, 0.6, 1.2)},
    delta=0.1,
    on_log=False,
    least={'N': 3, 'D': 3, 'G': 3},
  ),
  'inference_optimal': Form(
    InferenceOptimal,
    ('N', 'D', 'E'),
    _inference_optimal,
    scales=('a', 'b', 'c', 'f'),
    exponents={'alpha': _POWERS, 'beta': (0.3, 1.0), 'gamma': _POWERS, 'd': (0.0,), **_ENDS},
    delta=1e-3,
    on_log=True,
    least={'N': 3, 'D': 3, 'E': 3},
  ),
  'joint': Form(
    Joint,
    ('N', 'D', 'E'),
    _joint,
    scales=('a', 'b', 'c'),
    exponents={
      'alpha': (-0.15, -0.3, -0.5),
      'beta': (-0.15, -0.3, -0.5),
      'delta': (-0.3, 0.0),
      'gamma': (0.0,),
      'omega': (0.0, 0.5),
      'zeta': (0.0,),
      **_ENDS,
    },
    delta=1e-2,
    on_log=True,
    least={'N': 3, 'D': 3, 'E': 3},
  ),
}
"""Short name -> form."""
