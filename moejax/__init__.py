"""moejax: mixture-of-experts research in JAX.

Names are loaded when they are first used, so that what needs no JAX, such as `moejax.scaling`, starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from moejax import oracle as oracle
  from moejax.arrays import Assignment as Assignment
  from moejax.arrays import Aux as Aux
  from moejax.arrays import Context as Context
  from moejax.arrays import RoutingStats as RoutingStats
  from moejax.arrays import Scores as Scores
  from moejax.arrays import SoftPlan as SoftPlan
  from moejax.moe.layer import MoE as MoE
  from moejax.routers import Router as Router
  from moejax.routers import make_router as make_router
  from moejax.routers import router_names as router_names

_HOME = {
  'Assignment': 'arrays',
  'Aux': 'arrays',
  'Context': 'arrays',
  'RoutingStats': 'arrays',
  'Scores': 'arrays',
  'SoftPlan': 'arrays',
  'MoE': 'moe.layer',
  'Router': 'routers',
  'make_router': 'routers',
  'router_names': 'routers',
}

__all__ = ['oracle', *_HOME]


def __getattr__(name: str) -> Any:
  if name == 'oracle':
    return importlib.import_module('moejax.oracle')
  if name in _HOME:
    return getattr(importlib.import_module(f'moejax.{_HOME[name]}'), name)
  raise AttributeError(f'module moejax has no attribute {name!r}')


def __dir__() -> list[str]:
  return __all__
