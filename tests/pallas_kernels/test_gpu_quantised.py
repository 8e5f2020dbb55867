"""The Hopper body of quantised_matmul in Pallas' GPU interpreter, and what of it needs no simulation.

The interpreter widens without machine instructions and keeps columns in order; what the compiled kernel does with them
is in test_gpu_compiled.py. Smaller cases by default, with --full-matrix the table too.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Quantised, Unsupported, quantise, quantised_matmul
from pallas_kernels.grouped_matmul.cases import CASES, Case
from pallas_kernels.hopper import narrow, target
from pallas_kernels.quantised_matmul import gpu
from tests.pallas_kernels import products
from tests.pallas_kernels.test_gpu_interpreted import ROUNDING

KINDS = ('int8', 'float8_e4m3fn')
# Columns for each of two warpgroups, or rows for each. Tiles of 16 rows, so that groups of more have several.
SMALL = (
  (Case('uneven with a tail', 30, (5, 0, 20, 1)), 'int8', 'bfloat16', 256, True),
  (Case('a tile and a row', 20, (0, 17, 0)), 'float8_e4m3fn', 'float16', 128, False),
  (Case('tail only', 3, (0, 0)), 'int8', 'float16', 128, False),
)


def pytest_generate_tests(metafunc):
  if 'small' in metafunc.fixturenames:
    table = [
      (case, KINDS[i % 2], ('bfloat16', 'float16')[i // 2 % 2], (256, 128)[i // 4 % 2], i % 3 > 0)
      for i, case in enumerate(CASES)
      if case.num_rows
    ]
    full = metafunc.config.getoption('--full-matrix')
    chosen = [*SMALL, *(table if full else [])]
    names = lambda small: f'{small[0].name}-{small[1]}-{small[2]}-{small[3]}'
    metafunc.parametrize('small', chosen, ids=names)


def test_quantised_matmul_is_right_in_value(small):
  """Rows past the last group are NaN: nothing of them may be read. No row is multiplied by another's expert."""
  case, kind, dtype, columns, gather = small
  lhs, rhs, starts, dout = products.matmul_inputs(case, dtype, 128, columns)
  weights = quantise(rhs.astype(jnp.float32), kind)
  with target.simulated(1):
    found = np.asarray(
      jax.jit(functools.partial(gpu.forward, gather=gather))(lhs, *weights, starts)
    )
  exact = np.asarray(weights.values, np.float64) * np.asarray(weights.scale)
  wanted = products.matmul_by_hand(lhs, exact, starts, dout)['out']
  assert str(found.dtype) == dtype and products.distance(found, wanted) < ROUNDING[dtype]
  if len(case.sizes) > 1 and any(case.sizes):
    rotated = products.matmul_by_hand(lhs, np.roll(exact, 1, axis=0), starts, dout)['out']
    assert products.distance(found, rotated) > 0.1


@pytest.mark.parametrize(
  ('rows', 'experts', 'tile'),
  [(64, 128, 16), (8 * 64, 64, 16), (16 * 64, 64, 32), (32 * 8, 8, 64), (128 * 64, 64, 128)],
)
def test_a_tile_holds_most_groups_of_eight_to_128_rows_and_no_more(rows, experts, tile):
  """A second tile would read the weights again; of random routing, a group in fifty needs one."""
  assert narrow.rows_per_tile(rows, experts) == tile
  sizes = np.random.default_rng(0).multinomial(rows, [1 / experts] * experts, size=400)
  assert (sizes > tile).mean() < 0.05 or tile == narrow.ROWS[-1]
  assert tile == narrow.ROWS[0] or (sizes > tile // 2).mean() > 0.3


def ask(lhs, weights):
  sizes = jnp.array([2, 2], jnp.int32)
  run = lambda lhs, *weights: quantised_matmul(
    lhs, Quantised(*weights), sizes, implementation='gpu'
  )
  return jax.eval_shape(run, lhs, *weights)  # of arrays with values the chip is refused first


@pytest.mark.parametrize('kind', KINDS)
def test_what_the_body_cannot_do_is_refused_with_the_shapes(kind):
  weights = quantise(jnp.ones((2, 128, 128)), kind)
  assert ask(jnp.ones((4, 128), jnp.float16), weights).shape == (4, 128)
  with pytest.raises(Unsupported, match="'gpu' multiplies rows of bfloat16 or float16, not float3"):
    ask(jnp.ones((4, 128)), weights)
  with pytest.raises(Unsupported, match=r'multiples of 128, values.shape\[1\]=96'):
    ask(jnp.ones((4, 96), jnp.bfloat16), quantise(jnp.ones((2, 96, 128)), kind))
  with pytest.raises(Unsupported, match=r'multiples of 128, values.shape\[2\]=192'):
    ask(jnp.ones((4, 128), jnp.bfloat16), quantise(jnp.ones((2, 128, 192)), kind))


def test_rows_sharded_over_a_mesh_lower_to_a_kernel_that_reads_bytes(make_mesh):
  """Values of e4m3 reach it as they are: no program beside the kernel widens or copies them."""
  mesh = make_mesh(data=4)

  def layer(lhs, values, scale):
    sizes = jax.lax.pcast(jnp.array([8, 8], jnp.int32), ('data',), to='varying')
    return quantised_matmul(lhs, Quantised(values, scale), sizes, implementation='gpu')

  sharded = jax.shard_map(layer, mesh=mesh, in_specs=(P('data'), P(), P()), out_specs=P('data'))
  args = [
    jax.ShapeDtypeStruct((64, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((2, 128, 256), jnp.float8_e4m3fn),
    jax.ShapeDtypeStruct((2, 1, 256), jnp.float32),
  ]
  text = jax.jit(sharded).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @mosaic_gpu') == 1
  assert 'tensor<2x128x256xi8>' in text
  assert 'tensor<2x128x256xbf16>' not in text and 'tensor<2x128x256xf32>' not in text
