"""The TPU's grouped matmul on tiles of every kind, its visits and its choice of tiles."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported, grouped_matmul, tpu_tiles, visits
from pallas_kernels.tpu_tiles import Tiles
from tests.pallas_kernels.test_grouped_matmul import assert_equal, value_and_gradients

visit = jax.jit(visits.visit, static_argnums=(1, 2), static_argnames=('tail', 'empty'))


@pytest.mark.parametrize(('tail', 'empty'), [(False, False), (True, False), (False, True)])
@hypothesis.given(st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_each_overlap_of_a_tile_and_a_group_is_visited_once(tail, empty, sizes):
  """100 to 250 rows in tiles of 32, the last one cut off; the loop asks every tile about every group."""
  starts = np.cumsum([0, *sizes])
  num_rows = 250
  made = jax.tree.map(
    np.asarray, visit(jnp.asarray(starts, jnp.int32), num_rows, 32, tail=tail, empty=empty)
  )
  wanted = []
  for group, (start, end) in enumerate(zip(starts, [*starts[1:], num_rows], strict=True)):
    tiles = [t for t in range(8) if max(start, 32 * t) < min(end, 32 * t + 32)]
    if group < 4:
      wanted += [(t, group) for t in tiles or [min(start // 32, 7)] * empty]
    elif tail:
      wanted += [(t, group) for t in tiles]
  used = int(made.used[0])
  found = list(zip(made.tile.tolist(), made.group.tolist(), strict=True))
  assert found[:used] == wanted
  assert set(found[used:]) <= {found[max(used - 1, 0)]}


# 600 rows: two whole tiles of 256 and a cut one; the second group lies within a tile, one is empty, 20 rows are past
# the last.
SIZES, ROWS = (250, 6, 280, 0, 44), 600


@pytest.fixture(scope='module')
def arrays():
  rng = np.random.default_rng(0)
  lhs = rng.normal(size=(ROWS, 256))
  lhs[sum(SIZES) :] = np.nan
  return {
    'lhs': lhs.astype(np.float32),
    'rhs': (rng.normal(size=(5, 256, 128)) / 16).astype(np.float32),
    'group_sizes': np.array(SIZES, np.int32),
  }


@pytest.mark.parametrize('transpose_rhs', (False, True))
@pytest.mark.parametrize('tiles', (Tiles(256, 128, 128), Tiles(512, 256, 128)))
def test_tiles_of_several_parts_and_contractions_in_several_steps(
  tiles, transpose_rhs, arrays, monkeypatch
):
  fit = lambda rows, groups, inner, columns, *_: tiles._replace(
    inner=min(tiles.inner, inner), columns=min(tiles.columns, columns)
  )
  monkeypatch.setattr(tpu_tiles, 'for_rows', fit)
  monkeypatch.setattr(tpu_tiles, 'for_groups', fit)
  run = value_and_gradients.__wrapped__  # not the program that other tests have compiled
  found = run('tpu', transpose_rhs)(arrays)
  assert_equal(found, value_and_gradients('reference')(arrays), 1e-5)


# What the benchmark's shapes take, in bfloat16 and float32. Committed: a change of the prices shows here.
TABLE = {
  ('A, up', 262144, 64, 2048, 1024): [
    (1024, 2048, 512),
    (128, 2048, 512),
    (1024, 2048, 512),
    (128, 1024, 1024),
  ],
  ('A, down', 262144, 64, 1024, 2048): [
    (1024, 1024, 1024),
    (128, 1024, 1024),
    (1024, 1024, 1024),
    (128, 1024, 1024),
  ],
  ('B, up', 196608, 128, 1536, 256): [
    (1024, 1536, 256),
    (256, 1536, 256),
    (1024, 1536, 256),
    (256, 1536, 256),
  ],
  ('B, down', 196608, 128, 256, 1536): [
    (1024, 256, 768),
    (512, 256, 768),
    (1024, 256, 1536),
    (256, 256, 1536),
  ],
  ('C, up', 65536, 8, 4096, 14336): [
    (1024, 1024, 1024),
    (1024, 128, 1024),
    (1024, 2048, 512),
    (128, 1024, 1024),
  ],
  ('C, down', 65536, 8, 14336, 4096): [
    (1024, 1024, 1024),
    (1024, 128, 1024),
    (1024, 2048, 512),
    (128, 1024, 1024),
  ],
}


@pytest.mark.parametrize('shape', TABLE, ids=lambda shape: shape[0])
def test_the_tiles_of_the_benchmark(shape):
  rows, groups, inner, columns = shape[1:]
  found = [
    tuple(choose(rows, groups, inner, columns, size))
    for choose in (tpu_tiles.for_rows, tpu_tiles.for_groups)
    for size in (2, 4)
  ]
  assert found == TABLE[shape]


@hypothesis.given(
  st.integers(1, 100_000),
  st.integers(1, 300),
  st.integers(1, 40).map(lambda n: 128 * n),
  st.sampled_from([96, 256, 640, 2048]),
  st.sampled_from([2, 4]),
)
def test_tiles_cut_every_axis_evenly_and_fit(rows, groups, inner, columns, itemsize):
  for choose in (tpu_tiles.for_rows, tpu_tiles.for_groups):
    tiles = choose(rows, groups, inner, columns, itemsize)
    assert inner % tiles.inner == 0 and columns % tiles.columns == 0
    assert tiles.inner % 128 == 0 and (tiles.columns % 128 == 0 or tiles.columns == columns)
    assert tiles.rows == rows if rows < 128 else tiles.rows % 128 == 0 and tiles.rows <= rows
    twice = 2 * itemsize * (tiles.rows * tiles.inner + tiles.inner * tiles.columns)
    assert twice <= tpu_tiles.BUDGET


def test_axes_that_cannot_be_cut_are_refused_where_they_do_not_fit():
  with pytest.raises(Unsupported, match='no tile of 512 rows, 30001 and 129 columns fits'):
    tpu_tiles.for_rows(512, 4, 30001, 129, 4)


def test_it_lowers_for_tpus_inside_shard_map_with_shared_matrices(make_mesh):
  """check_vma=True: results vary over the axes of the rows, and the matrices' gradient is summed over them."""
  mesh = make_mesh(data=4)
  sharded = jax.shard_map(
    lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes[0], implementation='tpu'),
    mesh=mesh,
    in_specs=(P('data'), P(), P('data')),
    out_specs=P('data'),
  )
  gradient = jax.grad(lambda *args: jnp.sum(sharded(*args)), argnums=(0, 1))
  shapes = (512, 128), (4, 128, 128)
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  sizes = jax.ShapeDtypeStruct((4, 4), jnp.int32)
  text = jax.jit(gradient).trace(*args, sizes).lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('tpu_custom_call') == 2 and 'all_reduce' in text
