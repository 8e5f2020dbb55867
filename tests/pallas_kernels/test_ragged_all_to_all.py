"""Rows between four simulated devices: remote copies and the all-gather, against a loop over segments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported
from pallas_kernels.ragged_all_to_all import CHUNK, ragged_all_to_all
from pallas_kernels.ragged_all_to_all.cases import CASES, ROWS
from tests.pallas_kernels.interpreted import interpreted

BODIES = ('tpu',)
WIDTH = 8


def segments(sizes, num_rows):
  """(source, its first row, target, its first row, rows) of every pair, by counting."""
  upto = lambda size: -(-size // CHUNK) * CHUNK
  for s in range(4):
    for d in range(4):
      begin = sum(upto(size) for size in sizes[s, :d])
      end = sum(upto(size) for size in sizes[:s, d])
      yield s, begin, d, end, sizes[s, d]


def by_hand(x, sizes):
  """NumPy: `x [4, R, D]` of all devices."""
  out = np.zeros_like(x)
  for s, begin, d, end, size in segments(sizes, x.shape[1]):
    out[d, end : end + size] = x[s, begin : begin + size]
  return out


@functools.cache
def value_and_gradient(implementation, make_mesh):
  """A compiled function `(x [4, R, D], sizes) -> (out, dx)` of the loss sum(out^2) / 2, so that dx is out sent back."""

  def local(x, sizes):
    send = functools.partial(
      ragged_all_to_all, axis_name='expert', num_out_rows=ROWS, implementation=implementation
    )
    out, pull = jax.vjp(lambda x: send(x, sizes), x[0])
    return out[None], pull(out)[0][None]

  # The interpreter does not know over which axes values vary.
  options = dict(
    in_specs=(P('expert'), P()), out_specs=P('expert'), check_vma=implementation != 'tpu'
  )
  return jax.jit(jax.shard_map(local, mesh=make_mesh(expert=4), **options))


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
@pytest.mark.parametrize('case', CASES)
def test_each_segment_arrives_and_goes_back(case, implementation, make_mesh, capfd):
  sizes = CASES[case].astype(np.int32)
  x = np.random.default_rng(0).normal(size=(4, ROWS, WIDTH)).astype(np.float32)
  with interpreted(implementation):
    out, dx = map(np.asarray, value_and_gradient(implementation, make_mesh)(x, sizes))
  np.testing.assert_array_equal(out, by_hand(x, sizes))
  sent = np.zeros_like(x)
  for s, begin, _, _, size in segments(sizes, ROWS):
    sent[s, begin : begin + size] = x[s, begin : begin + size]
  np.testing.assert_array_equal(dx, sent)
  assert 'RACE DETECTED' not in capfd.readouterr().out


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_rows_without_room_are_lost_and_nothing_else(implementation, make_mesh):
  """Device 2 has 128 rows, is sent four times 48."""
  sizes = np.zeros((4, 4), np.int32)
  sizes[:, 2] = 48
  x = np.random.default_rng(0).normal(size=(4, ROWS, WIDTH)).astype(np.float32)
  with interpreted(implementation):
    out, _ = value_and_gradient(implementation, make_mesh)(x, sizes)
  wanted = np.concatenate([x[:, :48].reshape(-1, WIDTH)])[:ROWS]
  np.testing.assert_array_equal(out[2], wanted)
  assert not np.asarray(out)[[0, 1, 3]].any()


def test_bad_arguments_are_refused(make_mesh):
  def call(x, sizes, **options):
    options = dict(axis_name='expert', num_out_rows=ROWS) | options
    local = lambda x, sizes: ragged_all_to_all(x, sizes, **options)
    specs = dict(
      mesh=make_mesh(expert=4), in_specs=(P(), P()), out_specs=P('expert'), check_vma=False
    )
    return jax.eval_shape(jax.shard_map(local, **specs), x, sizes)

  x, sizes = jnp.ones((ROWS, WIDTH)), jnp.ones((4, 4), jnp.int32)
  with pytest.raises(ValueError, match=r'sizes int32\(3, 3\), expected int32\(4, 4\)'):
    call(x, sizes[:3, :3])
  with pytest.raises(ValueError, match="implementation='fast'"):
    call(x, sizes, implementation='fast')
  with pytest.raises(Unsupported, match=r'out float32\(100, 8\).*multiples of 16'):
    call(x, sizes, implementation='tpu', num_out_rows=100)
  with pytest.raises(Unsupported, match='x float16'):
    call(x.astype(jnp.float16), sizes, implementation='tpu')
