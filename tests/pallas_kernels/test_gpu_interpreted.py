"""The Hopper bodies in Pallas' GPU interpreter: threads, barriers and memories are simulated, races are errors.

What it cannot see is left to the compiled kernels (test_gpu_compiled.py) and to hardware (test_on_gpu.py): swizzles,
proxy fences, registers, time. Gathered rows are copied one by one here, since it knows no machine instructions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import packed
from pallas_kernels.expert_ffn import cases as ffn_cases
from pallas_kernels.expert_ffn import gpu as ffn_gpu
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.cases import Case
from pallas_kernels.hopper import store, target
from tests.pallas_kernels import products
from tests.pallas_kernels.products import distance

# 2^-8: the rounding of a result to bfloat16. Of float16, 2^-11.
ROUNDING = {'bfloat16': 2**-8, 'float16': 2**-11}
NARROW = Case('around a tile of 64 rows, a tail', 140, (1, 64, 65, 0))
WIDE = Case('around a tile of 128 rows, a tail', 390, (0, 127, 128, 129))


def matmul(inputs, *, transpose_rhs=False, gather=True):
  """The value and both gradients."""
  lhs, rhs, starts, dout = inputs
  rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
  options = dict(transpose_rhs=transpose_rhs, gather=gather)
  out = jax.jit(functools.partial(gpu.forward, **options))(lhs, rhs, starts)
  dlhs, drhs = jax.jit(functools.partial(gpu.backward, **options))(lhs, rhs, starts, dout)
  drhs = drhs.swapaxes(1, 2) if transpose_rhs else drhs
  return {name: np.asarray(x) for name, x in {'out': out, 'dlhs': dlhs, 'drhs': drhs}.items()}


def assert_near(found, wanted, tolerance):
  far = {name: distance(found[name], wanted[name]) for name in wanted}
  assert max(far.values()) < tolerance, far


@pytest.mark.parametrize(
  ('case', 'dtype', 'options', 'blocks'),
  [
    (NARROW, 'bfloat16', dict(gather=True), 2),
    (WIDE, 'bfloat16', dict(gather=False, transpose_rhs=True), 1),
    (Case('one hot expert', 64, (0, 40)), 'float16', dict(gather=False), 1),
    (Case('fewer rows than experts', 3, (1, 0, 0, 0, 2)), 'bfloat16', dict(gather=False), 1),
  ],
  ids=lambda value: getattr(value, 'name', None),
)
def test_grouped_matmul_is_right_in_value_and_gradient(case, dtype, options, blocks):
  """Rows and gradients past the last group are NaN: nothing of them may be read."""
  inputs = products.matmul_inputs(case, dtype)
  with target.simulated(blocks):
    found = matmul(inputs, **options)
  assert {str(x.dtype) for x in found.values()} == {dtype}
  wanted = products.matmul_by_hand(*inputs)
  assert_near(found, wanted, ROUNDING[dtype])
  rotated = products.matmul_by_hand(inputs[0], np.roll(inputs[1], 1, axis=0), *inputs[2:])
  assert distance(found['out'], rotated['out']) > 0.1


def test_grouped_matmul_of_no_rows_is_zero():
  inputs = products.matmul_inputs(Case('tail only', 64, (0, 0)), 'bfloat16')
  with target.simulated(1):
    found = matmul(inputs)
  assert not any(x.any() for x in found.values())


def test_wide_columns_and_weights_of_float32_whose_gradient_is_not_rounded():
  """Tiles of 256 columns; lhs and dout are rounded, their products and sums are not."""
  lhs, rhs, starts, dout = products.matmul_inputs(Case('', 40, (10, 30)), 'bfloat16', 128, 256)
  with target.simulated(1):
    found = matmul((lhs, rhs.astype(jnp.float32), starts, dout), gather=False)
  wanted = products.matmul_by_hand(lhs, rhs, starts, dout)
  assert found['drhs'].dtype == np.float32 and distance(found['drhs'], wanted['drhs']) < 1e-5
  assert distance(found['out'], wanted['out']) < ROUNDING['bfloat16']


def routed(*sizes):
  """A token-major routing of 64 tokens with two choices each; the last size is of dropped rows."""
  return ffn_cases.Case('', 64, 2, len(sizes) - 1, ffn_cases._sizes(*sizes))


@pytest.mark.parametrize(
  ('activation', 'gated', 'sizes'),
  [('silu', True, (65, 0, 40, 23)), ('gelu', False, (0, 0, 60, 68))],
)
def test_expert_ffn_is_right_in_value_and_gradient(activation, gated, sizes):
  """Tiles of 64 rows; an expert just past a tile, empty ones, and dropped rows."""
  arrays = products.ffn_inputs(routed(*sizes), 'bfloat16')
  options = dict(activation=activation, gated=gated)
  with target.simulated(1):
    found = products.ffn(arrays, 'gpu', **options)
  # 8 bits of mantissa, twice where the hidden layer is rounded too; the loss sees the rounded y.
  assert_near(found, products.ffn_by_reference(arrays, **options), 2e-2)
  dropped = np.asarray(arrays['expert']) == len(sizes) - 1
  assert not found['weight'][dropped].any() and (found['weight'][~dropped] != 0).all()


def test_expert_ffn_with_tiles_of_128_rows_in_memory():
  """Two warpgroups share out the rows; the rows are gathered by XLA; no NaN of a dropped token spreads."""
  arrays = products.ffn_inputs(routed(128, 0), 'bfloat16')
  plan = packed.sort_rows(arrays['expert'], 1)
  args = (arrays['token'], arrays['weight'], plan)
  weights = ((arrays['w_gate'], arrays['w_up']), arrays['w_down'])
  options = dict(activation='relu', groups=64, gather=False)
  with target.simulated(1):
    forward = jax.jit(functools.partial(ffn_gpu.forward, **options, save=True))
    y, pre = forward(arrays['x'], *args, *weights)
    dy = jnp.cos(y.astype(jnp.float32)).astype(y.dtype)
    backward = jax.jit(functools.partial(ffn_gpu.backward, **options))
    dx, dweight, (dgate, dup), ddown = backward(arrays['x'], *args, *weights, pre, dy)
    found = {'y': y, 'x': dx, 'weight': dweight, 'w_gate': dgate, 'w_up': dup, 'w_down': ddown}
    found = {name: np.asarray(value) for name, value in found.items()}
  assert_near(found, products.ffn_by_reference(arrays, activation='relu'), 2e-2)
  assert pre.shape[1] == 256 and pre.dtype == jnp.bfloat16  # gate and up, in the type of x


def test_a_race_is_an_error(monkeypatch):
  """The control: both warpgroups send their results through the same memory."""
  lhs, rhs, starts, _ = products.matmul_inputs(Case('', 64, (64,)), 'bfloat16')
  honest = store.Writer.__init__
  monkeypatch.setattr(store.Writer, '__init__', lambda self, chunks, wg: honest(self, chunks, 0))
  forward = jax.jit(functools.partial(gpu.forward, transpose_rhs=False, gather=False))
  with pytest.raises(RuntimeError, match='(?i)race'), target.simulated(1):
    forward(lhs, rhs, starts).block_until_ready()
