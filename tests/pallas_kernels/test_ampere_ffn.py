"""`expert_ffn` for Ampere, simulated as in test_ampere.py: its products in Pallas' GPU interpreter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported, packed
from pallas_kernels.ampere import machine
from pallas_kernels.expert_ffn import ampere, composed
from pallas_kernels.expert_ffn.cases import CASES, Case
from tests.pallas_kernels import products
from tests.pallas_kernels.products import distance
from tests.pallas_kernels.test_gpu_interpreted import routed
from tests.thorough import and_thorough

# 8 bits of mantissa, twice where the hidden layer is rounded too; the loss sees the rounded y. Of float16, 11 bits.
TOLERANCE = {'bfloat16': 2e-2, 'float16': 3e-3}
SMALL = (  # activation, whether gated, type
  (routed('uneven, some dropped', 65, 0, 40, 23), 'silu', True, 'bfloat16'),
  (routed('one choice', 0, 60, 0, 68, choices=1), 'gelu', False, 'bfloat16'),
  (routed('one expert', 128, 0), 'relu', True, 'float16'),
  (routed('all dropped', 0, 0, 128), 'relu2', True, 'bfloat16'),
  (Case('fewer rows than experts', 3, 1, 5, np.array([4, 0, 4])), 'silu', True, 'bfloat16'),
)
# What is the same for this body.
SAME = {'balanced': 'uneven, some dropped', 'a little uneven': 'uneven, some dropped'}
SAME |= {'empty experts at both ends': 'one choice', 'one hot expert': 'one expert'}
SAME |= {'around the block width': 'uneven, some dropped'}


def test_each_case_of_the_table_has_a_smaller_one():
  named = {case.name for case in CASES} - {'no rows'}  # no body sees these
  assert {SAME.get(name, name) for name in named} <= {layer[0].name for layer in SMALL}


def pytest_generate_tests(metafunc):
  if 'layer' in metafunc.fixturenames:
    table = [(case, 'silu', True, 'bfloat16') for case in CASES if case.num_choices]
    full = metafunc.config.getoption('--full-matrix')
    chosen = [*and_thorough(SMALL[:2], SMALL[2:]), *(table if full else [])]
    metafunc.parametrize('layer', chosen, ids=lambda layer: layer[0].name)


def poisoned(arrays, num_experts):
  """NaN in the weights of dropped rows, and in the tokens of which all rows are dropped."""
  dropped = arrays['expert'] == num_experts
  kept = jnp.zeros(len(arrays['x']), bool).at[arrays['token']].max(~dropped)
  x = jnp.where(kept[:, None], arrays['x'], jnp.nan)
  return {**arrays, 'x': x, 'weight': jnp.where(dropped, jnp.nan, arrays['weight'])}


def test_expert_ffn_is_right_in_value_and_gradient(layer):
  """Dropped rows are read by nothing, and zero in value and gradient; kept ones are not."""
  case, activation, gated, dtype = layer
  arrays = poisoned(products.ffn_inputs(case, dtype), case.num_experts)
  options = dict(activation=activation, gated=gated)
  with machine.simulated():
    found = products.ffn(arrays, 'ampere', **options)
  wanted = products.ffn_by_reference(arrays, **options)
  assert found['y'].dtype == dtype and found['weight'].dtype == np.float32
  far = {name: distance(found[name], wanted[name]) for name in wanted}
  assert max(far.values()) < TOLERANCE[dtype], far
  dropped = np.asarray(arrays['expert']) == case.num_experts
  assert not found['weight'][dropped].any() and (found['weight'][~dropped] != 0).all()
  if case.num_experts > 1 and not dropped.all():
    rotated = {n: jnp.roll(x, 1, axis=0) if n[:2] == 'w_' else x for n, x in arrays.items()}
    assert distance(found['y'], products.ffn_by_reference(rotated, **options)['y']) > 0.1


def test_pre_activations_are_kept_as_all_bodies_keep_them():
  """`[2, save, F]` in packed order in the type of x, zeros past them; weights of float32 have such gradients."""
  arrays = products.ffn_inputs(SMALL[0][0], 'bfloat16')
  wide = {name: arrays[name].astype(jnp.float32) for name in ('w_gate', 'w_up', 'w_down')}
  plan = packed.sort_rows(arrays['expert'], 3)
  into, rows = (wide['w_gate'], wide['w_up']), (arrays['token'], arrays['weight'], plan)
  args = (arrays['x'], *rows, into, wide['w_down'])
  assert composed.saved_rows(128, 3) == 128
  with machine.simulated():
    options = dict(activation='silu', groups=64)
    y, pre = jax.jit(lambda: ampere.forward(*args, **options, save=150))()
    dy = jnp.ones_like(y)
    _, _, dinto, ddown = jax.jit(lambda: ampere.backward(*args, pre, dy, **options))()
  assert pre.shape == (2, 150, 128) and pre.dtype == jnp.bfloat16
  assert not np.asarray(pre[:, 105:]).any()  # 105 rows are kept
  sorted_x = np.asarray(arrays['x'][arrays['token'][plan.order]], np.float64)
  gate = sorted_x[:65] @ np.asarray(arrays['w_gate'][0], np.float64)
  assert distance(pre[0, :65], gate) < 2**-8
  assert {x.dtype for x in (*dinto, ddown)} == {jnp.dtype('float32')}


@pytest.mark.parametrize(
  ('dtype', 'd_ff', 'sentence'),
  [
    ('float32', 128, "'ampere' multiplies rows of bfloat16 or float16, not float32"),
    ('bfloat16', 96, "'ampere' wants multiples of 128, d_ff=96"),
  ],
)
def test_what_the_body_cannot_do_is_refused_with_what_it_can(dtype, d_ff, sentence):
  arrays = products.ffn_inputs(SMALL[0][0], dtype, 128, d_ff)
  with pytest.raises(Unsupported, match=f'^expert_ffn: implementation={sentence}\\b'):
    products.ffn(arrays, 'ampere')
