"""The correctness cases of every body, run on this machine's device (bench_kernels.py --check)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import expert_ffn, grouped_matmul, quantise, quantised_matmul
from pallas_kernels.expert_ffn import NAMES as FFN_NAMES
from pallas_kernels.expert_ffn.cases import CASES as FFN_CASES
from pallas_kernels.grouped_matmul import NAMES as MATMUL_NAMES
from pallas_kernels.grouped_matmul.cases import CASES as MATMUL_CASES
from pallas_kernels.quantised_matmul import NAMES as QUANTISED_NAMES

WIDTH, HIDDEN = 128, 256  # what every body takes
# Relative to the largest entry: 8 bits of mantissa, twice where the hidden layer is rounded too.
TOLERANCE = {'bfloat16': 2e-2, 'float32': 1e-4}


class Routing(NamedTuple):
  """What expert_ffn reads of an assignment."""

  token: Any
  expert: Any
  weight: Any
  num_experts: int
  groups: int


def _matmul(name, arrays):
  call = lambda lhs, rhs: grouped_matmul(lhs, rhs, arrays['group_sizes'], implementation=name)
  out, pull = jax.vjp(call, arrays['lhs'], arrays['rhs'])
  return out, *pull(jnp.sin(out))


def _quantised(name, arrays):
  """Both types of weights."""
  weights = [quantise(arrays['rhs'], kind) for kind in ('int8', 'float8_e4m3fn')]
  options = dict(group_sizes=arrays['group_sizes'], implementation=name)
  return [quantised_matmul(arrays['lhs'], one, **options) for one in weights]


def _ffn(name, arrays):
  num_experts, num_tokens = arrays['w_up'].shape[0], arrays['x'].shape[0]

  def call(x, weight, gate, up, down):
    routing = Routing(arrays['token'], arrays['expert'], weight, num_experts, num_tokens)
    return expert_ffn(x, routing, gate, up, down, activation='silu', implementation=name)

  trained = [arrays[n] for n in ('x', 'weight', 'w_gate', 'w_up', 'w_down')]
  out, pull = jax.vjp(call, *trained)
  return out, *pull(jnp.sin(out))


def _distance(found, wanted) -> float:
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  if not np.isfinite(found).all():
    return float('inf')
  return float(np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1))


def run(dtype, backend: str, refusals) -> list[dict]:
  """One row a body and case: 'ok', 'WRONG by ...' or why it refuses."""
  rows = []
  suites = (
    ('grouped_matmul', MATMUL_NAMES, MATMUL_CASES, _matmul),
    ('expert_ffn', FFN_NAMES, FFN_CASES, _ffn),
    ('quantised_matmul', QUANTISED_NAMES, MATMUL_CASES, _quantised),
  )
  for operation, names, cases, function in suites:
    bodies = [n for n in names if n != 'reference' and n in ('blocks', 'cpu', backend)]
    for case in cases:
      narrow = lambda x: jnp.asarray(x, dtype if x.dtype.kind == 'f' else x.dtype)
      arrays = {n: narrow(x) for n, x in case.arrays(np.float32, WIDTH, HIDDEN).items()}
      with jax.default_matmul_precision('highest'):
        wanted = jax.jit(functools.partial(function, 'reference'))(arrays)
        for name in bodies:
          row = dict(operation=operation, implementation=name, case=case.name)
          try:
            found = jax.jit(functools.partial(function, name))(arrays)
            far = max(_distance(f, w) for f, w in zip(found, wanted, strict=True))
            row['result'] = (
              'ok' if far < TOLERANCE[jnp.dtype(dtype).name] else f'WRONG by {far:.1e}'
            )
          except refusals as error:
            row['result'] = f'refused: {str(error).splitlines()[0][:120]}'
          rows.append(row)
  return rows
