"""Every body of grouped_matmul in value and gradient against the dense reference, on every named case."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported, grouped_matmul
from pallas_kernels.grouped_matmul import check_axes
from pallas_kernels.grouped_matmul.cases import CASES
from pallas_kernels.registry import accumulator
from tests.pallas_kernels.interpreted import cases_of_bodies, interpreted, parametrize_cases

BODIES = ('blocks', 'cpu', 'tpu')
ON_A_CPU = ('blocks', 'cpu')
TOLERANCE = {'float32': 1e-5, 'float64': 1e-10}  # relative to the largest entry
BY_NAME = {case.name: case for case in CASES}


def pytest_generate_tests(metafunc):
  # In bfloat16 one case, with --full-matrix all; in float32 and float64 all cases always.
  if metafunc.function.__name__.startswith('test_bfloat16'):
    parametrize_cases(metafunc, CASES, [BY_NAME['balanced']])


@functools.cache
def value_and_gradients(implementation, transpose_rhs=False):
  """A compiled function: arrays -> (out, gradients of lhs and rhs)."""

  def loss(lhs, rhs, group_sizes):
    options = dict(transpose_rhs=transpose_rhs, implementation=implementation)
    out = grouped_matmul(lhs, rhs, group_sizes, **options)
    return jnp.sum(jnp.sin(out.astype(accumulator(out)))), out

  def run(arrays):
    rhs = arrays['rhs'].swapaxes(1, 2) if transpose_rhs else arrays['rhs']
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, out), (dlhs, drhs) = gradient(arrays['lhs'], rhs, arrays['group_sizes'])
    return {'out': out, 'lhs': dlhs, 'rhs': drhs.swapaxes(1, 2) if transpose_rhs else drhs}

  jitted = jax.jit(run)

  def call(arrays):
    with interpreted(implementation):
      return jitted({name: jnp.asarray(value) for name, value in arrays.items()})

  return call


def distance(found, wanted) -> float:
  """Largest deviation relative to the largest entry; absolute where all entries are zero."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape and np.isfinite(found).all()
  return float(np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1))


def assert_equal(found, wanted, tolerance):
  far = {name: distance(found[name], wanted[name]) for name in wanted}
  assert max(far.values()) < tolerance, far


def by_hand(arrays):
  """NumPy, one row after the other."""
  out, row = np.zeros((len(arrays['lhs']), arrays['rhs'].shape[2])), 0
  for expert, size in enumerate(arrays['group_sizes']):
    for _ in range(size):
      out[row] = arrays['lhs'][row] @ arrays['rhs'][expert]
      row += 1
  return out


USUAL = (
  'uneven with a tail',
  'around the block width',
  'one hot expert',
  'fewer rows than experts',
)


@pytest.mark.parametrize(('case', 'implementation'), cases_of_bodies(CASES, BODIES, USUAL))
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_value_and_gradient_equal_the_reference(case, implementation, dtype):
  """The rows past the last group hold NaN in every case that has such rows."""
  if (implementation, dtype) == ('tpu', 'float64') and case.num_rows:
    with jax.enable_x64(True), pytest.raises(Unsupported, match='float64'):
      value_and_gradients(implementation)(case.arrays(dtype))
    return
  with jax.enable_x64(dtype == 'float64'):
    arrays = case.arrays(dtype)
    wanted = value_and_gradients('reference')(arrays)
    found = value_and_gradients(implementation)(arrays)
    assert all(found[name].dtype == dtype for name in found)
    assert_equal(found, wanted, TOLERANCE[dtype])
    assert distance(found['out'], by_hand(arrays)) < TOLERANCE[dtype]


@pytest.mark.parametrize('implementation', BODIES)
def test_transposed_matrices(implementation):
  arrays = BY_NAME['uneven with a tail'].arrays('float32')
  wanted = value_and_gradients('reference')(arrays)
  assert_equal(value_and_gradients(implementation, transpose_rhs=True)(arrays), wanted, 1e-5)


@pytest.mark.parametrize('implementation', BODIES)
def test_experts_rotated_by_one_are_far_off(implementation):
  arrays = BY_NAME['uneven with a tail'].arrays('float32')
  wanted = value_and_gradients('reference')(arrays)
  found = value_and_gradients(implementation)({**arrays, 'rhs': np.roll(arrays['rhs'], 1, axis=0)})
  assert min(distance(found[name], wanted[name]) for name in wanted) > 0.1


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_rows_past_the_last_group_are_zero_in_value_and_gradient(implementation):
  arrays = BY_NAME['uneven with a tail'].arrays('float32')
  found = value_and_gradients(implementation)(arrays)
  assert np.isnan(arrays['lhs'][412:]).all()
  assert not np.asarray(found['out'])[412:].any() and not np.asarray(found['lhs'])[412:].any()


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_a_nan_in_one_group_reaches_no_other(implementation):
  arrays = BY_NAME['balanced'].arrays('float32')
  arrays['lhs'][128] = np.nan  # the first row of expert 1
  found = {name: np.asarray(v) for name, v in value_and_gradients(implementation)(arrays).items()}
  others = np.delete(np.arange(512), 128)
  assert np.isfinite(found['out'][others]).all() and np.isfinite(found['lhs'][others]).all()
  assert np.isfinite(found['rhs'][[0, 2, 3]]).all()


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_a_device_with_some_of_the_experts_computes_their_rows_alone(implementation):
  """Experts 1 and 2 of four, or 2 and 3: the others' rows hold NaN, as do those past the last group."""
  arrays = BY_NAME['uneven with a tail'].arrays('float32')
  whole = value_and_gradients('reference')(arrays)
  first_e = np.cumsum([0, *arrays['group_sizes']])

  @jax.jit
  def run(lhs, rhs, offset):
    def loss(lhs, rhs):
      options = dict(group_offset=offset, implementation=implementation)
      out = grouped_matmul(lhs, rhs, jnp.asarray(arrays['group_sizes']), **options)
      return jnp.sum(jnp.sin(out)), out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(lhs, rhs)

  for offset in (1, 2):
    own = slice(first_e[offset], first_e[offset + 2])
    lhs = np.full_like(arrays['lhs'], np.nan)
    lhs[own] = arrays['lhs'][own]
    with interpreted(implementation):
      (_, out), (dlhs, drhs) = run(lhs, arrays['rhs'][offset : offset + 2], jnp.int32(offset))
    wanted = {'rhs': whole['rhs'][offset : offset + 2]}
    for name in ('out', 'lhs'):
      wanted[name] = np.zeros_like(whole[name])
      wanted[name][own] = whole[name][own]
    assert_equal({'out': out, 'lhs': dlhs, 'rhs': drhs}, wanted, 1e-5)


@pytest.mark.parametrize('implementation', BODIES)
def test_bfloat16_rounds_the_result_only(implementation, case):
  arrays = case.arrays('float32')
  narrow = {n: jnp.asarray(arrays[n], jnp.bfloat16) for n in ('lhs', 'rhs')}
  sizes = jnp.asarray(arrays['group_sizes'])
  with interpreted(implementation):
    out = grouped_matmul(*narrow.values(), sizes, implementation=implementation)
  wide = {n: np.asarray(value, np.float64) for n, value in narrow.items()}
  wanted = by_hand({**arrays, **wide})
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize('implementation', (*ON_A_CPU, None))
def test_rows_sharded_over_a_mesh_equal_one_device(implementation, make_mesh):
  """check_vma=True: each device holds 128 rows in groups of its own; the matrices are shared."""
  mesh = make_mesh(data=4, expert=2)
  arrays = BY_NAME['balanced'].arrays('float32')
  sizes = np.array([[128, 0, 0, 0], [30, 30, 30, 30], [0, 0, 1, 99], [1, 2, 64, 61]], np.int32)
  matmul = functools.partial(grouped_matmul, implementation=implementation)
  sharded = jax.shard_map(
    lambda lhs, rhs, sizes: matmul(lhs, rhs, sizes[0]),
    mesh=mesh,
    in_specs=(P('data'), P(), P('data')),
    out_specs=P('data'),
  )

  def loss(lhs, rhs):
    out = sharded(lhs, rhs, jnp.asarray(sizes))
    return jnp.sum(jnp.sin(out)), out

  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  lhs, rhs = jnp.asarray(arrays['lhs']), jnp.asarray(arrays['rhs'])
  (_, out), (dlhs, drhs) = gradient(lhs, rhs)
  parts = [
    value_and_gradients('reference')({**arrays, 'lhs': rows, 'group_sizes': size})
    for rows, size in zip(np.split(arrays['lhs'], 4), sizes, strict=True)
  ]
  wanted = {n: np.concatenate([part[n] for part in parts]) for n in ('out', 'lhs')}
  wanted['rhs'] = sum(np.asarray(part['rhs']) for part in parts)
  assert_equal({'out': out, 'lhs': dlhs, 'rhs': drhs}, wanted, 1e-5)


def test_devices_with_one_expert_each_add_up_to_all(make_mesh):
  """check_vma=True: every device sees all rows, and takes those of its own expert."""
  mesh = make_mesh(expert=4)
  arrays = BY_NAME['uneven with a tail'].arrays('float32')
  sizes = jnp.asarray(arrays['group_sizes'])

  def own(lhs, rhs):
    out = grouped_matmul(lhs, rhs, sizes, group_offset=jax.lax.axis_index('expert'))
    return jax.lax.psum(out, 'expert')

  everyone = jax.shard_map(own, mesh=mesh, in_specs=(P(), P('expert')), out_specs=P())

  def loss(lhs, rhs):
    out = everyone(lhs, rhs)
    return jnp.sum(jnp.sin(out)), out

  gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
  (_, out), (dlhs, drhs) = gradient(jnp.asarray(arrays['lhs']), jnp.asarray(arrays['rhs']))
  wanted = value_and_gradients('reference')(arrays)
  assert_equal({'out': out, 'lhs': dlhs, 'rhs': drhs}, wanted, 1e-5)


def test_bad_arguments_are_refused():
  arrays = BY_NAME['one expert'].arrays('float32')
  lhs, rhs = jnp.asarray(arrays['lhs']), jnp.asarray(arrays['rhs'])
  sizes = jnp.asarray(arrays['group_sizes'])
  with pytest.raises(
    ValueError, match="implementation='fast'.*'blocks', 'cpu', 'gpu', 'reference'"
  ):
    grouped_matmul(lhs, rhs, sizes, implementation='fast')
  with pytest.raises(ValueError, match=r'rhs.shape=\(1, 8, 12\).*wants lhs.shape\[1\]=12'):
    grouped_matmul(lhs, rhs, sizes, transpose_rhs=True)
  with pytest.raises(Unsupported, match='lhs is float8_e5m2'):
    grouped_matmul(lhs.astype(jnp.float8_e5m2), rhs, sizes)
  with pytest.raises(
    ValueError, match=r'group_sizes=\[65\]: none may be negative, nor all exceed R=64'
  ):
    grouped_matmul(lhs, rhs, jnp.asarray([65], jnp.int32))
  with pytest.raises(ValueError, match=r'group_sizes=\[-1\]'):
    grouped_matmul(lhs, rhs, jnp.asarray([-1], jnp.int32))


def test_axes_and_types_of_group_sizes_are_checked_without_a_type_checker():
  lhs, rhs, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2, jnp.int32)
  with pytest.raises(
    ValueError, match=r'lhs.shape=\(1, 4, 3\).*expected \[R, D\], \[E, D, F\] and \[E\]'
  ):
    check_axes(lhs[None], rhs, sizes)
  with pytest.raises(ValueError, match=r'group_sizes.shape=\(1,\)'):
    check_axes(lhs, rhs, sizes[:1])
  with pytest.raises(ValueError, match='group_sizes.dtype=float32, expected int32'):
    check_axes(lhs, rhs, sizes.astype(jnp.float32))


def test_an_offset_that_leaves_a_matrix_without_a_group_is_refused():
  lhs, rhs, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(3, jnp.int32)
  with pytest.raises(ValueError, match='group_offset=2: expected 0 to 1, so that every matrix'):
    grouped_matmul(lhs, rhs, sizes, group_offset=2)
  with pytest.raises(ValueError, match='group_offset=-1: expected 0 to 1'):
    grouped_matmul(lhs, rhs, sizes, group_offset=-1)
  with pytest.raises(ValueError, match=r'group_offset=1.0: expected one integer'):
    check_axes(lhs, rhs, sizes, 1.0)
  with pytest.raises(ValueError, match=r'expected \[R, D\], \[E, D, F\] and \[G\] of E groups'):
    check_axes(lhs, rhs, sizes[:1], 0)


def test_the_tpu_refuses_what_its_kernels_do_not_compute():
  lhs, rhs, sizes = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones(2, jnp.int32)
  # of shapes, since arrays that have values lie on a CPU
  matmul = functools.partial(
    jax.eval_shape, functools.partial(grouped_matmul, implementation='tpu')
  )
  with pytest.raises(Unsupported, match=r'lhs float16\(4, 3\), rhs float32\(2, 3, 5\)'):
    matmul(lhs.astype(jnp.float16), rhs, sizes)
  with pytest.raises(Unsupported, match='no tile of 4 rows, 100001 and 5003 columns fits'):
    matmul(jnp.ones((4, 100001)), jax.ShapeDtypeStruct((2, 100001, 5003), 'f4'), sizes)
