"""The TPU's grouped matmul on tiles of every kind, its visits and its choice of tiles."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported, grouped_matmul, tpu_tiles, tpu_weights, visits
from pallas_kernels.expert_ffn import tpu as ffn_tpu
from pallas_kernels.tpu_tiles import Tiles
from tests.pallas_kernels.interpreted import interpreted
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


@pytest.mark.parametrize('steps', (1, 3))
@hypothesis.given(st.lists(st.integers(0, 60), min_size=4, max_size=4))
def test_blocks_of_matrices_come_in_the_order_in_which_visits_read_them(steps, sizes):
  """A loop over the visits lists the blocks that they read; a whole matrix is read anew by another group only."""
  starts = jnp.asarray(np.cumsum([0, *sizes]), jnp.int32)
  made = visit(starts, 250, 32, tail=True)
  found = jax.tree.map(np.asarray, tpu_weights.blocks_of(made, steps))
  read = []
  for v in range(int(made.used[0])):
    group = int(made.group[v])
    if group == 4:
      continue  # rows past the last group read none
    if steps > 1:
      assert len(read) == v * steps
      read += [group] * steps
    elif not read or read[-1] != group:
      read.append(group)
      assert found.turn[v] == len(read) - 1
    else:
      assert found.turn[v] == len(read) - 1
  assert found.total.tolist() == [len(read)]
  if steps == 1:
    assert found.order[: len(read)].tolist() == read


def test_a_race_is_an_error():
  """The control: what a copy brings is read before it is waited for."""

  def hasty(x, out, buffer, arrived):
    copy = pltpu.make_async_copy(x, buffer, arrived)
    copy.start()
    out[...] = buffer[...]
    copy.wait()

  scratch = [pltpu.VMEM((8, 128), jnp.float32), pltpu.SemaphoreType.DMA]
  call = pl.pallas_call(
    hasty,
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    scratch_shapes=scratch,
  )
  with pytest.raises(Exception, match='(?i)race'), interpreted('tpu'):
    jax.block_until_ready(jax.jit(call)(jnp.ones((8, 128))))
  pltpu.reset_tpu_interpret_mode_state()


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


@pytest.mark.parametrize('tiles', (Tiles(256, 256, 128), Tiles(256, 128, 128)))
def test_two_cores_share_out_the_columns(tiles, monkeypatch):
  """Four tiles of columns, groups smaller than a tile, and rows past the last group; of a matrix whole and in parts."""
  monkeypatch.setattr(tpu_tiles, 'for_rows', lambda *_: tiles)
  rng = np.random.default_rng(0)
  lhs = rng.normal(size=(600, 256)).astype(np.float32)
  rhs = rng.normal(size=(5, 256, 512)).astype(np.float32) / 16
  matmul = lambda name: jax.jit(
    lambda lhs, rhs: grouped_matmul(lhs, rhs, jnp.array(SIZES, jnp.int32), implementation=name)
  )
  with interpreted('tpu', cores=2):
    found = np.asarray(matmul('tpu')(lhs, rhs))
  np.testing.assert_allclose(found, matmul('reference')(lhs, rhs), atol=1e-5)


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


@pytest.mark.parametrize(
  ('sizes', 'alone'),
  [
    ((32768, 2048, 1024, 64, 8), set()),
    ((24576, 1536, 256, 128, 8), {'dhidden', 'ddown'}),  # 256 columns: x would be read twice
    ((32768, 4096, 14336, 8, 2), set()),
  ],
  ids=('A', 'B', 'C'),
)
def test_a_device_of_two_cores_has_work_for_both(sizes, alone):
  """An even number of tiles of columns (of weights: of tiles in all), but for those named, where one core works."""
  t, d, f, e, k = sizes
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  tiles = ffn_tpu.check(array(t, d), t * k, (array(e, d, f),) * 2, array(e, f, d))
  whole = {'up': (1, f), 'down': (1, d), 'dhidden': (1, f), 'dx': (1, d)}
  whole |= {'dup': (d, f), 'ddown': (f, d)}
  parts = {
    name: max(1, down // tile.inner) * (across // tile.columns)
    for (name, tile), (down, across) in zip(
      tiles._asdict().items(), (whole[name] for name in tiles._fields), strict=True
    )
  }
  assert {name for name, count in parts.items() if count % 2} == alone, parts


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
    buffers = tpu_weights.BUFFERS if choose is tpu_tiles.for_rows else 2
    blocks = 2 * tiles.rows * tiles.inner + buffers * tiles.inner * tiles.columns
    assert itemsize * blocks <= tpu_tiles.BUDGET


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
