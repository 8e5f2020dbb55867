"""Inputs and expected results of the 16-bit bodies: products of rounded numbers, summed in float64 by NumPy."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import expert_ffn
from pallas_kernels.registry import accumulator

TRAINED = ('x', 'weight', 'w_gate', 'w_up', 'w_down')


def distance(found, wanted) -> float:
  """Largest deviation relative to the largest entry; absolute where all entries are zero."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape and np.isfinite(found).all()
  return float(np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1))


def matmul_inputs(case, dtype, width_in=128, width_out=128):
  """lhs, rhs, first rows of the groups, and a gradient of the result that is NaN past the last group."""
  arrays = case.arrays('float32', width_in, width_out)
  dout = np.random.default_rng(1).normal(size=(case.num_rows, width_out))
  dout[sum(case.sizes) :] = np.nan
  starts = jnp.asarray(np.cumsum([0, *case.sizes]), jnp.int32)
  narrow = lambda x: jnp.asarray(x, dtype)
  return narrow(arrays['lhs']), narrow(arrays['rhs']), starts, narrow(dout)


def matmul_by_hand(lhs, rhs, starts, dout):
  """(out, dlhs, drhs), group by group."""
  lhs, rhs, dout = (np.asarray(x, np.float64) for x in (lhs, rhs, dout))
  out, dlhs, drhs = np.zeros(dout.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
  for e, (first, end) in enumerate(itertools.pairwise(np.asarray(starts))):
    rows = slice(first, end)
    out[rows], dlhs[rows] = lhs[rows] @ rhs[e], dout[rows] @ rhs[e].T
    drhs[e] = lhs[rows].T @ dout[rows]
  return {'out': out, 'dlhs': dlhs, 'drhs': drhs}


def ffn_inputs(case, dtype, d_model=128, d_ff=128):
  """Arrays by name; the weights of rows stay float32."""
  arrays = {n: jnp.asarray(v) for n, v in case.arrays('float32', d_model, d_ff).items()}
  return arrays | {n: arrays[n].astype(dtype) for n in TRAINED if n != 'weight'}


def ffn(arrays, implementation, activation='silu', gated=True):
  """The value and the gradients of expert_ffn under a loss that looks random, by name."""

  def loss(trained):
    assignment = types.SimpleNamespace(
      token=arrays['token'],
      expert=arrays['expert'],
      weight=trained['weight'],
      num_experts=arrays['w_up'].shape[0],
      groups=arrays['x'].shape[0],
    )
    weights = (trained['w_gate'] if gated else None, trained['w_up'], trained['w_down'])
    options = dict(activation=activation, implementation=implementation)
    y = expert_ffn(trained['x'], assignment, *weights, **options)
    return jnp.sum(jnp.sin(y.astype(accumulator(y)))), y

  trained = {name: arrays[name] for name in TRAINED if gated or name != 'w_gate'}
  (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained)
  return jax.tree.map(np.asarray, {'y': y, **gradients})


def ffn_by_reference(arrays, **options):
  """The same in float32, of the same rounded inputs."""
  wide = {n: arrays[n].astype(jnp.float32) for n in TRAINED}
  return ffn(arrays | wide, 'reference', **options)
