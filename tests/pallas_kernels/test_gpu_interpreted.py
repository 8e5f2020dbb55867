"""The Hopper bodies in Pallas' GPU interpreter: threads, barriers and memories are simulated, races are errors.

What it cannot see is left to the compiled kernels (test_gpu_compiled.py) and to hardware (test_on_gpu.py): swizzles,
proxy fences, registers, time. Gathered rows are copied one by one here, since it knows no machine instructions.

The default suite takes a smaller case for each one of the tables, which one of the two operations has; --full-matrix
takes all of both tables.
"""

import functools
import types
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lay_out, pack, packed, top_k
from pallas_kernels.expert_ffn import cases as ffn_cases
from pallas_kernels.expert_ffn import gpu as ffn_gpu
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.grouped_matmul.cases import CASES, Case
from pallas_kernels.hopper import store, target
from pallas_kernels.routing.cases import PACK_CASES, TOP_K_CASES, PackCase, TopKCase
from tests.pallas_kernels import products
from tests.pallas_kernels.products import distance
from tests.thorough import and_thorough

# 2^-8: the rounding of a result to bfloat16. Of float16, 2^-11.
ROUNDING = {'bfloat16': 2**-8, 'float16': 2**-11}


class Small(NamedTuple):
  """A smaller case of a name of the tables, and the variant of the kernels that it tries."""

  case: Case
  dtype: str = 'bfloat16'
  options: Mapping = types.MappingProxyType({})
  blocks: int = 1


WITHOUT_GATHER = dict(gather=False)
TRANSPOSED = dict(gather=False, transpose_rhs=True)
SMALL = (  # tiles of 64 rows; the second has tiles of 128
  Small(Case('uneven with a tail', 140, (1, 64, 65, 0)), blocks=2),
  Small(Case('around the block width', 390, (0, 127, 128, 129)), options=TRANSPOSED),
  Small(Case('one hot expert', 64, (0, 40)), 'float16', WITHOUT_GATHER),
  Small(Case('fewer rows than experts', 3, (1, 0, 0, 0, 2)), options=WITHOUT_GATHER),
  Small(Case('tail only', 64, (0, 0))),
)


def routed(name, *sizes, choices=2):
  """A token-major routing of 128 rows; the last size is of dropped rows."""
  experts = len(sizes) - 1
  return ffn_cases.Case(name, 128 // choices, choices, experts, ffn_cases._sizes(*sizes))


# Of routing, ties, all experts, infinities and NaNs; dropped rows, one row, more experts than are counted at a time.
ROUTED = (
  TOP_K_CASES[1],
  TOP_K_CASES[5],
  TOP_K_CASES[-1],
  PACK_CASES[1],
  PACK_CASES[6],
  PACK_CASES[8],
)

SMALL_LAYERS = (  # and activation, whether gated
  (routed('uneven, some dropped', 65, 0, 40, 23), 'silu', True),
  (routed('one choice', 0, 60, 0, 68, choices=1), 'gelu', False),
)
ONE_EXPERT = routed('one expert', 128, 0)
BALANCED = Case('balanced', 40, (20, 20))
# What two operations call by different names.
SAME = {'all dropped': 'tail only', 'uneven, some dropped': 'uneven with a tail'}
SAME |= {'empty experts at both ends': 'one choice', 'one row': 'fewer rows than experts'}
SAME |= {'a tile and a row': 'around the block width', 'a little uneven': 'uneven with a tail'}


def test_each_case_of_the_tables_has_a_smaller_one():
  small = {small.case.name for small in SMALL} | {layer[0].name for layer in SMALL_LAYERS}
  small |= {ONE_EXPERT.name, BALANCED.name}
  named = {case.name for case in (*CASES, *ffn_cases.CASES)} - {'no rows'}  # no body sees these
  assert {SAME.get(name, name) for name in named} <= small


def pytest_generate_tests(metafunc):
  full = metafunc.config.getoption('--full-matrix')
  if 'routed_case' in metafunc.fixturenames:
    table = (*TOP_K_CASES, *PACK_CASES) if full else ROUTED
    metafunc.parametrize('routed_case', table, ids=lambda case: case.name)
  if 'small' in metafunc.fixturenames:
    options = ({}, TRANSPOSED)
    table = [
      Small(case, options=options[i % 2], blocks=2) for i, case in enumerate(CASES) if case.num_rows
    ]
    names = lambda small: small.case.name
    small = and_thorough(SMALL[:3], SMALL[3:])
    metafunc.parametrize('small', [*small, *(table if full else [])], ids=names)
  if 'layer' in metafunc.fixturenames:
    # of no rows there is nothing that a body could do: nobody calls one
    table = [(case, 'silu', True) for case in ffn_cases.CASES if case.num_choices]
    names = lambda layer: layer[0].name
    small = and_thorough(SMALL_LAYERS[:1], SMALL_LAYERS[1:])
    metafunc.parametrize('layer', [*small, *(table if full else [])], ids=names)


def choices(case: TopKCase):
  """What the kernel finds and what it should: the gradient is that of the chosen, by autodiff."""
  logits = jnp.asarray(case.logits)
  prob, expert = top_k(logits, case.k, implementation='reference')
  cotangent = jnp.cos(jnp.arange(expert.size, dtype=jnp.float32)).reshape(expert.shape)
  chosen = lambda x: jnp.take_along_axis(jax.nn.softmax(x, axis=1), expert, axis=1)
  (gradient,) = jax.vjp(chosen, logits)[1](cotangent)

  @jax.jit
  def run(logits):
    best = lambda x: top_k(x, case.k, implementation='gpu')
    prob, pull, expert = jax.vjp(best, logits, has_aux=True)
    return {'prob': prob, 'expert': expert, 'gradient': pull(cotangent)[0]}

  with target.simulated():
    found = jax.tree.map(np.asarray, run(logits))
  return found, {'prob': prob, 'expert': expert, 'gradient': gradient}


def packing(case: PackCase):
  """What the kernel finds and what it should, and so the layout in tiles of 8 rows."""
  rows, experts = jnp.asarray(case.expert, jnp.int32), case.num_experts

  def run(rows, name):
    packed_rows = pack(rows, experts, implementation=name)
    layout = lay_out(rows, experts, 8, implementation=name)
    return dict(packed_rows._asdict(), **{f'layout {k}': x for k, x in layout._asdict().items()})

  with target.simulated():
    found = jax.tree.map(np.asarray, jax.jit(functools.partial(run, name='gpu'))(rows))
  return found, run(rows, 'reference')


def test_routing_is_right_in_value_and_gradient(routed_case):
  """A NaN is seen, in value and gradient, and in its token only."""
  route = choices if isinstance(routed_case, TopKCase) else packing
  found, wanted = route(routed_case)
  assert set(found) == set(wanted)
  for name, value in found.items():
    assert value.dtype == wanted[name].dtype, name
    if name == 'gradient':
      np.testing.assert_allclose(value, wanted[name], atol=1e-6)
    elif name == 'prob':
      np.testing.assert_allclose(value, wanted[name], rtol=1e-6)
    else:
      np.testing.assert_array_equal(value, wanted[name], err_msg=name)


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


def test_grouped_matmul_is_right_in_value_and_gradient(small):
  """Rows and gradients past the last group are NaN: nothing of them may be read."""
  inputs = products.matmul_inputs(small.case, small.dtype)
  with target.simulated(small.blocks):
    found = matmul(inputs, **small.options)
  assert {str(x.dtype) for x in found.values()} == {small.dtype}
  wanted = products.matmul_by_hand(*inputs)
  assert_near(found, wanted, ROUNDING[small.dtype])
  if len(small.case.sizes) > 1 and any(small.case.sizes):
    rotated = products.matmul_by_hand(inputs[0], np.roll(inputs[1], 1, axis=0), *inputs[2:])
    assert distance(found['out'], rotated['out']) > 0.1


def test_wide_columns_and_weights_of_float32_whose_gradient_is_not_rounded():
  """Tiles of 256 columns; lhs and dout are rounded, their products and sums are not."""
  lhs, rhs, starts, dout = products.matmul_inputs(BALANCED, 'bfloat16', 128, 256)
  with target.simulated(1):
    found = matmul((lhs, rhs.astype(jnp.float32), starts, dout), gather=False)
  wanted = products.matmul_by_hand(lhs, rhs, starts, dout)
  assert found['drhs'].dtype == np.float32 and distance(found['drhs'], wanted['drhs']) < 1e-5
  assert distance(found['out'], wanted['out']) < ROUNDING['bfloat16']


def test_expert_ffn_is_right_in_value_and_gradient(layer):
  """Dropped rows are zero in value and gradient; kept ones are not."""
  case, activation, gated = layer
  arrays = products.ffn_inputs(case, 'bfloat16')
  options = dict(activation=activation, gated=gated)
  with target.simulated(1):
    found = products.ffn(arrays, 'gpu', **options)
  # 8 bits of mantissa, twice where the hidden layer is rounded too; the loss sees the rounded y.
  assert_near(found, products.ffn_by_reference(arrays, **options), 2e-2)
  dropped = np.asarray(arrays['expert']) == case.num_experts
  assert not found['weight'][dropped].any() and (found['weight'][~dropped] != 0).all()


def test_expert_ffn_with_tiles_of_128_rows_in_memory():
  """Two warpgroups share out the rows; the rows are gathered by XLA; no NaN of a dropped token spreads."""
  arrays = products.ffn_inputs(ONE_EXPERT, 'bfloat16')
  plan = packed.sort_rows(arrays['expert'], 1)
  args = (arrays['token'], arrays['weight'], plan)
  weights = ((arrays['w_gate'], arrays['w_up']), arrays['w_down'])
  options = dict(activation='relu', groups=64, gather=False)
  with target.simulated(1):
    save = ffn_gpu.saved_rows(128, 1)
    forward = jax.jit(functools.partial(ffn_gpu.forward, **options, save=save))
    y, pre = forward(arrays['x'], *args, *weights)
    dy = jnp.cos(y.astype(jnp.float32)).astype(y.dtype)
    backward = jax.jit(functools.partial(ffn_gpu.backward, **options))
    dx, dweight, (dgate, dup), ddown = backward(arrays['x'], *args, *weights, pre, dy)
    found = {'y': y, 'x': dx, 'weight': dweight, 'w_gate': dgate, 'w_up': dup, 'w_down': ddown}
    found = {name: np.asarray(value) for name, value in found.items()}
  assert_near(found, products.ffn_by_reference(arrays, activation='relu'), 2e-2)
  assert pre.shape == (2, save, 128) and pre.dtype == jnp.bfloat16  # gate and up, in the type of x


def test_a_race_is_an_error(monkeypatch):
  """The control: both warpgroups send their results through the same memory."""
  lhs, rhs, starts, _ = products.matmul_inputs(Case('', 64, (64,)), 'bfloat16')
  honest = store.Writer.__init__
  monkeypatch.setattr(store.Writer, '__init__', lambda self, chunks, wg: honest(self, chunks, 0))
  forward = jax.jit(functools.partial(gpu.forward, transpose_rhs=False, gather=False))
  with pytest.raises(RuntimeError, match='(?i)race'), target.simulated(1):
    forward(lhs, rhs, starts).block_until_ready()
