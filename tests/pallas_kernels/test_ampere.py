"""The body for Ampere: its tiles, what it refuses, and its kernels in Pallas' GPU interpreter.

The interpreter has neither its products nor its copies: machine.Simulation puts others in their place (jnp.dot, copies
that complete a barrier), and the tiles, the ring, the bounds and the stores are those of the hardware. So all of it
runs with jax 0.10 too, whose Pallas could not compile it. What the compiler makes of the rest: test_ampere_compiled.py.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Unsupported, grouped_matmul
from pallas_kernels.ampere import machine, tiles
from pallas_kernels.grouped_matmul import ampere
from pallas_kernels.grouped_matmul.cases import CASES, Case
from tests.pallas_kernels import products
from tests.pallas_kernels.products import distance

# 2^-8: the rounding of a result to bfloat16. Of float16, 2^-11.
ROUNDING = {'bfloat16': 2**-8, 'float16': 2**-11}
SMALL = (  # of one shape, so that one program runs them; windows of 64 rows begin at multiples of 8
  Case('uneven with a tail', 140, (1, 64, 65, 0)),
  Case('empty experts at both ends', 140, (0, 63, 77, 0)),
  Case('one hot expert', 140, (0, 0, 140, 0)),
  Case('around the block width', 140, (31, 32, 33, 7)),
  Case('tail only', 140, (0, 0, 0, 0)),
)
OTHERS = (
  (Case('fewer rows than experts', 3, (1, 0, 0, 0, 2)), 'float16', True),
  (Case('one expert', 211, (200,)), 'bfloat16', True),
)
# What is the same for this body.
SAME = {'balanced': 'around the block width', 'one row': 'fewer rows than experts'}
SAME |= {'a tile and a row': 'uneven with a tail'}

cut = jax.jit(tiles.cut, static_argnums=(1, 2))


@hypothesis.given(st.lists(st.integers(0, 90), min_size=4, max_size=4), st.sampled_from([64, 128]))
def test_each_row_is_in_one_tile_of_its_expert_and_that_in_a_window(sizes, tile):
  """Of 360 rows, those past the last group are in tiles of nobody."""
  starts = np.cumsum([0, *sizes]).astype(np.int32)
  found = jax.tree.map(np.asarray, cut(jnp.asarray(starts), 360, tile))
  used = found.used[0]
  assert used <= len(found.expert) == tiles.room(360, 5, tile)
  owner = np.repeat(np.arange(5), [*sizes, 360 - sum(sizes)])
  spans = list(zip(found.low[:used], found.high[:used], strict=True))
  assert [row for low, high in spans for row in range(low, high)] == list(range(360))
  for (low, high), expert in zip(spans, found.expert, strict=False):
    assert low < high and set(owner[low:high]) == {expert}
    assert high - tiles.window(low) <= tile and tiles.window(low) % 8 == 0


def test_rows_are_copied_only_where_a_window_would_leave_them():
  x = jnp.ones((72, 3))
  assert tiles.padded(x, 64) is x
  assert tiles.padded(x, 128).shape == (128, 3) and tiles.padded(x[:70], 64).shape == (72, 3)
  assert not tiles.padded(x[:70], 64)[70:].any()


def ask(lhs, rhs):
  sizes = jnp.array([2, 2], jnp.int32)
  run = lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, implementation='ampere')
  return jax.eval_shape(run, lhs, rhs)  # of arrays with values the chip is refused first


def test_jax_without_the_product_is_told_which_has_it(monkeypatch):
  """As the jax of Python 3.11 has it not, so every jax may be made to lack it."""
  monkeypatch.delattr(machine.plgpu, 'mma', raising=False)
  lhs, rhs = jnp.ones((4, 128), jnp.bfloat16), jnp.ones((2, 128, 128), jnp.bfloat16)
  sentence = (
    f"'ampere' needs jax 0.11 or newer, whose Pallas has plgpu.mma, not jax {jax.__version__}"
  )
  with pytest.raises(Unsupported, match=sentence):
    ask(lhs, rhs)
  gradient = jax.grad(lambda rhs: ask_and_sum(lhs, rhs))
  with pytest.raises(Unsupported, match=sentence):
    jax.eval_shape(gradient, rhs)


def ask_and_sum(lhs, rhs):
  sizes = jnp.array([2, 2], jnp.int32)
  return grouped_matmul(lhs, rhs, sizes, implementation='ampere').astype(jnp.float32).sum()


def test_what_the_body_cannot_do_is_refused_with_the_shapes():
  narrow = jnp.bfloat16
  with pytest.raises(Unsupported, match="'ampere' multiplies rows of bfloat16 or float16"):
    ask(jnp.ones((4, 128)), jnp.ones((2, 128, 128)))
  with pytest.raises(Unsupported, match=r"'ampere' wants multiples of 128, rhs.shape\[2\]=96"):
    ask(jnp.ones((4, 128), narrow), jnp.ones((2, 128, 96), narrow))


def test_each_case_of_the_table_has_a_smaller_one():
  small = {case.name for case in SMALL} | {other[0].name for other in OTHERS}
  named = {case.name for case in CASES} - {'no rows'}  # no body sees these
  assert {SAME.get(name, name) for name in named} <= small


def pytest_generate_tests(metafunc):
  if 'case' in metafunc.fixturenames:
    table = [(case, 'bfloat16', i % 2 == 1) for i, case in enumerate(CASES) if case.num_rows]
    full = metafunc.config.getoption('--full-matrix')
    small = [*((case, 'bfloat16', False) for case in SMALL), *OTHERS]
    chosen = [*small, *(table if full else [])]
    names = [case.name for case, _, _ in chosen]
    metafunc.parametrize(('case', 'dtype', 'transpose_rhs'), chosen, ids=names)


@functools.cache
def program(transpose_rhs):
  """A compiled function: (lhs, rhs, starts, dout) -> the value and both gradients."""

  def run(lhs, rhs, starts, dout):
    rhs = rhs.swapaxes(1, 2) if transpose_rhs else rhs
    out = ampere.forward(lhs, rhs, starts, transpose_rhs=transpose_rhs)
    dlhs, drhs = ampere.backward(lhs, rhs, starts, dout, transpose_rhs=transpose_rhs)
    return {'out': out, 'dlhs': dlhs, 'drhs': drhs.swapaxes(1, 2) if transpose_rhs else drhs}

  return jax.jit(run)


def simulate(inputs, transpose_rhs=False):
  with machine.simulated():
    return jax.tree.map(np.asarray, program(transpose_rhs)(*inputs))


def test_grouped_matmul_is_right_in_value_and_gradient(case, dtype, transpose_rhs):
  """Rows and gradients past the last group are NaN: nothing of them may be read into a result."""
  inputs = products.matmul_inputs(case, dtype)
  found = simulate(inputs, transpose_rhs)
  assert {str(x.dtype) for x in found.values()} == {dtype}
  wanted = products.matmul_by_hand(*inputs)
  far = {name: distance(found[name], wanted[name]) for name in wanted}
  assert max(far.values()) < ROUNDING[dtype], far
  if len(case.sizes) > 1 and any(case.sizes):
    rotated = products.matmul_by_hand(inputs[0], np.roll(inputs[1], 1, axis=0), *inputs[2:])
    assert distance(found['out'], rotated['out']) > 0.1


def test_a_nan_in_one_group_reaches_no_other():
  """Windows overlap: the first and the last step of a sum see rows of other experts."""
  lhs, rhs, starts, dout = products.matmul_inputs(SMALL[3], 'bfloat16')
  lhs = lhs.at[40].set(jnp.nan)  # of expert 1, whose rows are 31 to 62
  found = simulate((lhs, rhs, starts, dout))
  assert np.isfinite(found['drhs'][[0, 2, 3]]).all() and np.isnan(found['drhs'][1]).any()
  assert np.isnan(found['out'][40]).all() and np.isfinite(np.delete(found['out'], 40, 0)).all()


def test_wider_matrices_of_float32_whose_gradient_is_not_rounded():
  """Several tiles of columns and of rows of a matrix; lhs and dout are rounded, their products and sums are not."""
  lhs, rhs, starts, dout = products.matmul_inputs(Case('', 40, (20, 20)), 'bfloat16', 128, 256)
  found = simulate((lhs, rhs.astype(jnp.float32), starts, dout))
  wanted = products.matmul_by_hand(lhs, rhs, starts, dout)
  assert found['drhs'].dtype == np.float32 and distance(found['drhs'], wanted['drhs']) < 1e-5
  assert distance(found['out'], wanted['out']) < ROUNDING['bfloat16']
  assert distance(found['dlhs'], wanted['dlhs']) < ROUNDING['bfloat16']


def test_rows_before_the_first_group_are_of_no_expert():
  """What a device that holds some experts of many asks for (group_offset): it masks those rows itself."""
  lhs, rhs, starts, dout = products.matmul_inputs(SMALL[3], 'bfloat16')
  later = starts.at[0].set(20)
  lhs, dout = (x.at[:20].set(jnp.nan) for x in (lhs, dout))
  found, wanted = simulate((lhs, rhs, later, dout)), products.matmul_by_hand(lhs, rhs, later, dout)
  for name, rows in {'out': slice(20, None), 'dlhs': slice(20, None), 'drhs': slice(None)}.items():
    assert distance(found[name][rows], wanted[name][rows]) < ROUNDING['bfloat16'], name


def test_a_stage_that_nobody_waits_for_is_seen(monkeypatch):
  """The control: the copies of a stage are under way when it is read, and when it is filled again."""
  lhs, rhs, starts, _ = products.matmul_inputs(Case('', 64, (64,)), 'bfloat16')
  monkeypatch.setattr(machine.Simulation, 'wait', lambda self, pending, landed: None)
  forward = jax.jit(functools.partial(ampere.forward, transpose_rhs=False))
  with pytest.raises((RuntimeError, ValueError), match='(?i)race|observed'), machine.simulated():
    forward(lhs, rhs, starts).block_until_ready()
