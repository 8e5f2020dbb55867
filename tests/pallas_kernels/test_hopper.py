"""The parts of the Hopper bodies that need no simulation: layouts, tiles, slopes, what is refused."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported, grouped_matmul, pack, top_k
from pallas_kernels.activations import ACTIVATIONS
from pallas_kernels.hopper import layout, tiles
from pallas_kernels.hopper.activations import SLOPES
from pallas_kernels.hopper.rows import raster

lay_out = jax.jit(layout.lay_out, static_argnums=(1, 2))


@hypothesis.given(st.lists(st.integers(0, 90), min_size=4, max_size=4), st.integers(0, 30))
def test_each_row_is_once_in_a_tile_of_its_expert(sizes, before):
  """Of 390 rows, those before the first group (a group offset) and past the last are in no tile."""
  starts = np.cumsum([before, *sizes]).astype(np.int32)
  found = jax.tree.map(np.asarray, lay_out(jnp.asarray(starts), 390, 64))
  kept = found.row >= 0
  rows = np.arange(starts[0], starts[-1])
  assert sorted(found.row[kept]) == list(rows)
  owner = np.repeat(np.arange(4), sizes)
  np.testing.assert_array_equal(np.repeat(found.expert, 64)[kept], owner[found.row[kept] - before])
  np.testing.assert_array_equal(found.row[found.slot[rows]], rows)
  used = sum(-(-size // 64) for size in sizes)
  assert found.used == used and not kept[used * 64 :].any()
  np.testing.assert_array_equal(found.steps, [-(-size // 64) for size in sizes])
  ends = found.first + found.steps * layout.DEPTH
  assert (ends <= len(found.row)).all() and (found.first[1:] >= ends[:-1]).all()


def test_rows_are_spread_with_zeros_between_and_collected_again():
  starts = jnp.array([0, 3, 3, 5], jnp.int32)
  found = layout.lay_out(starts, 6, 64)
  x = jnp.array([1.0, 2.0, 3.0, 4.0, 5.0, jnp.nan])[:, None]
  padded = layout.spread(x, found.row)
  assert padded[:4, 0].tolist() == [1, 2, 3, 0] and padded[64:67, 0].tolist() == [4, 5, 0]
  assert layout.collect(padded, found, starts[-1])[:, 0].tolist() == [1, 2, 3, 4, 5, 0]


@pytest.mark.parametrize(('used', 'columns'), [(1, 1), (8, 3), (21, 4)])
def test_the_raster_visits_each_tile_once_and_keeps_to_eight_tiles_of_rows(used, columns):
  index = jnp.arange(used * columns, dtype=jnp.int32)
  rows, column = raster(index, jnp.int32(used), columns)
  pairs = list(zip(rows.tolist(), column.tolist(), strict=True))
  assert sorted(pairs) == [(m, n) for m in range(used) for n in range(columns)]
  assert pairs == sorted(pairs, key=lambda pair: (pair[0] // 8, pair[1], pair[0]))


@pytest.mark.parametrize('name', ACTIVATIONS)
def test_values_and_slopes_are_those_of_the_table(name):
  x = jnp.array([-6.0, -1.0, -0.1, 0.2, 1.0, 7.0])
  value, slope = SLOPES[name](x)
  np.testing.assert_allclose(value, ACTIVATIONS[name](x), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(slope, jax.vmap(jax.grad(ACTIVATIONS[name]))(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('rows', 'experts', 'tile'), [(32768 * 8, 64, 128), (24576 * 8, 128, 128), (256 * 8, 64, 64)]
)
def test_tiles_are_as_high_as_groups_fill_them(rows, experts, tile):
  assert tiles.rows_per_tile(rows, experts) == tile
  assert tiles.choose(tile, 2048).columns == 256 and tiles.choose(tile, 384).columns == 128
  assert tiles.choose(tile, 512, sides=2) == tiles.Tiles(tile, 256, 4)
  assert tiles.choose(tile, 1024, epilogue_buffers=2).columns == 128


def ask(lhs, rhs):
  sizes = jnp.array([2, 2], jnp.int32)
  run = lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation='gpu')
  return jax.eval_shape(run, lhs, rhs)  # of arrays with values the chip is refused first


def test_what_the_body_cannot_do_is_refused_with_the_shapes():
  narrow = jnp.bfloat16
  with pytest.raises(
    Unsupported, match="'gpu' multiplies rows of bfloat16 or float16, not float32"
  ):
    ask(jnp.ones((4, 128)), jnp.ones((2, 128, 128)))
  with pytest.raises(Unsupported, match='wants rhs of that type or float32, not float16'):
    ask(jnp.ones((4, 128), narrow), jnp.ones((2, 128, 128), jnp.float16))
  with pytest.raises(Unsupported, match=r'multiples of 128, rhs.shape\[2\]=96'):
    ask(jnp.ones((4, 128), narrow), jnp.ones((2, 128, 96), narrow))


def test_routing_of_more_experts_than_registers_or_counts_hold_is_refused():
  logits, rows = jnp.ones((4, 257)), jnp.zeros(4, jnp.int32)
  with pytest.raises(Unsupported, match=r'top_k on GPU: logits are float32 \(4, 257\)'):
    jax.eval_shape(lambda logits: top_k(logits, 2, implementation='gpu'), logits)
  with pytest.raises(Unsupported, match='pack on GPU: 4 rows of 1025 experts'):
    jax.eval_shape(lambda rows: pack(rows, 1025, implementation='gpu'), rows)
