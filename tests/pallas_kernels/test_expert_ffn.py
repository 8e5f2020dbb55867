"""Every body of expert_ffn in value and gradient against the dense reference, on every named case."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported, expert_ffn
from pallas_kernels.expert_ffn.cases import CASES
from pallas_kernels.registry import accumulator
from tests.pallas_kernels.interpreted import cases_of_bodies, interpreted, parametrize_cases

BODIES = ('blocks', 'cpu', 'tpu')
ON_A_CPU = ('blocks', 'cpu')
TRAINED = ('x', 'weight', 'w_gate', 'w_up', 'w_down')
TOLERANCE = {'float32': 1e-5, 'float64': 1e-10}  # relative to the largest entry
BY_NAME = {case.name: case for case in CASES}


def pytest_generate_tests(metafunc):
  # In bfloat16 one case, with --full-matrix all; in float32 and float64 all cases always.
  if metafunc.function.__name__.startswith('test_bfloat16'):
    parametrize_cases(metafunc, CASES, [BY_NAME['uneven, some dropped']])


def apply(arrays, implementation, *, activation='silu', groups=None, num_experts=None):
  """expert_ffn of a dict of arrays; token-major rows unless `groups` says otherwise."""
  a = {name: None if value is None else jnp.asarray(value) for name, value in arrays.items()}
  assignment = types.SimpleNamespace(
    token=a['token'],
    expert=a['expert'],
    weight=a['weight'],
    num_experts=num_experts or a['w_up'].shape[0],
    groups=a['x'].shape[0] if groups is None else groups,
  )
  return expert_ffn(
    a['x'],
    assignment,
    a['w_gate'],
    a['w_up'],
    a['w_down'],
    activation=activation,
    implementation=implementation,
  )


@functools.cache
def value_and_gradients(implementation, activation='silu', groups=None, linear=False):
  """A compiled function: arrays -> (y, gradients by name of a random-looking loss, linear in y or not)."""

  def loss(trained, rest):
    y = apply({**rest, **trained}, implementation, activation=activation, groups=groups)
    wide = y.astype(accumulator(y))
    share = jnp.cos(jnp.arange(y.size, dtype=wide.dtype)).reshape(y.shape)
    return jnp.sum(share * wide if linear else jnp.sin(wide)), y

  def run(arrays):
    trained = {n: arrays[n] for n in TRAINED if arrays[n] is not None}
    rest = {n: value for n, value in arrays.items() if n not in trained}
    (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(trained, rest)
    return {'y': y, **gradients}

  jitted = jax.jit(run)

  def call(arrays):
    with interpreted(implementation):
      return jitted(arrays)

  return call


def distance(found, wanted) -> float:
  """Largest deviation relative to the largest entry; absolute where all entries are zero."""
  found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
  assert found.shape == wanted.shape and np.isfinite(found).all()
  return float(np.abs(found - wanted).max(initial=0) / (np.abs(wanted).max(initial=0) or 1))


def assert_equal(found, wanted, tolerance):
  assert found.keys() == wanted.keys()
  far = {name: distance(found[name], wanted[name]) for name in wanted}
  assert max(far.values()) < tolerance, far


USUAL = ('uneven, some dropped', 'around the block width', 'one choice', 'fewer rows than experts')


@pytest.mark.parametrize(('case', 'implementation'), cases_of_bodies(CASES, BODIES, USUAL))
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_value_and_gradient_equal_the_reference(case, implementation, dtype):
  if (implementation, dtype) == ('tpu', 'float64') and case.num_choices:
    with jax.enable_x64(True), pytest.raises(Unsupported, match='x float64'):
      value_and_gradients(implementation)(case.arrays(dtype))
    return
  with jax.enable_x64(dtype == 'float64'):
    arrays = case.arrays(dtype)
    wanted = value_and_gradients('reference')(arrays)
    found = value_and_gradients(implementation)(arrays)
    assert all(found[name].dtype == dtype for name in found)
    assert_equal(found, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize('case', CASES[:2], ids=lambda case: case.name)
def test_without_a_name_the_cpu_takes_its_own_body(case):
  arrays = case.arrays('float32')
  found, wanted = (value_and_gradients(name)(arrays) for name in (None, 'cpu'))
  for name in wanted:
    np.testing.assert_array_equal(found[name], wanted[name])


@pytest.mark.parametrize('implementation', BODIES)
def test_experts_rotated_by_one_are_far_off(implementation):
  arrays = BY_NAME['uneven, some dropped'].arrays('float32')
  wanted = value_and_gradients('reference')(arrays)
  rotated = {**arrays, 'expert': np.where(arrays['expert'] < 4, (arrays['expert'] + 1) % 4, 4)}
  found = value_and_gradients(implementation)(rotated)
  assert min(distance(found[name], wanted[name]) for name in wanted) > 10 * TOLERANCE['float32']
  assert distance(found['y'], wanted['y']) > 0.1


@pytest.mark.parametrize('implementation', BODIES)
def test_rows_in_any_order_with_tokens_that_repeat_or_are_absent(implementation):
  arrays = BY_NAME['uneven, some dropped'].arrays('float32')
  arrays['token'] = np.random.default_rng(2).integers(0, 100, 512).astype(np.int32)
  wanted = value_and_gradients('reference', groups=1)(arrays)
  assert_equal(value_and_gradients(implementation, groups=1)(arrays), wanted, 1e-5)
  assert not np.asarray(wanted['x'])[100:].any() and not np.asarray(wanted['y'])[100:].any()


@pytest.mark.parametrize('implementation', BODIES)
@pytest.mark.parametrize(
  ('activation', 'gated'),
  [('gelu', True), ('relu', True), ('relu2', False), ('silu', False)],
)
def test_gated_and_plain_experts_of_every_activation(activation, gated, implementation):
  arrays = BY_NAME['one choice'].arrays('float32')
  if not gated:
    arrays['w_gate'] = None
  wanted = value_and_gradients('reference', activation)(arrays)
  assert_equal(value_and_gradients(implementation, activation)(arrays), wanted, 1e-5)


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_a_nan_in_a_token_without_kept_rows_stays_there(implementation):
  arrays = BY_NAME['one choice'].arrays('float32')
  clean = value_and_gradients(implementation)(arrays)
  lost = arrays['expert'] == 4
  x = np.where(lost[:, None], np.nan, arrays['x']).astype(np.float32)
  weight = np.where(lost, np.nan, arrays['weight']).astype(np.float32)
  found = value_and_gradients(implementation)({**arrays, 'x': x, 'weight': weight})
  for name in clean:
    np.testing.assert_array_equal(found[name], clean[name])
  assert not np.asarray(found['weight'])[lost].any() and not np.asarray(found['x'])[lost].any()


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_a_nan_in_a_kept_token_reaches_no_other_expert(implementation):
  arrays = BY_NAME['one choice'].arrays('float32')
  sick = np.flatnonzero(arrays['expert'] == 2)
  arrays['x'][sick] = np.nan
  found = {name: np.asarray(v) for name, v in value_and_gradients(implementation)(arrays).items()}
  healthy = np.setdiff1d(np.arange(96), sick)
  assert np.isnan(found['y'][sick]).all() and np.isfinite(found['y'][healthy]).all()
  assert np.isfinite(found['w_up'][[0, 1, 3]]).all() and np.isfinite(found['x'][healthy]).all()


@pytest.mark.parametrize('implementation', BODIES)
def test_the_gradient_of_the_weights_of_kept_rows_is_not_zero(implementation):
  arrays = BY_NAME['uneven, some dropped'].arrays('float32')
  gradient = np.asarray(value_and_gradients(implementation)(arrays)['weight'])
  kept = arrays['expert'] < 4
  assert (gradient[kept] != 0).all() and not gradient[~kept].any()


@pytest.mark.parametrize('implementation', BODIES)
def test_bfloat16_is_as_near_to_float64_as_its_roundings_allow(implementation, case):
  narrow = {
    name: jnp.asarray(value, jnp.bfloat16) if value.dtype == np.float32 else value
    for name, value in case.arrays('float32').items()
  }
  narrow['weight'] = case.arrays('float32')['weight']
  # A loss that is not linear would multiply what y is off by with its slope.
  found = value_and_gradients(implementation, linear=True)(narrow)
  with jax.enable_x64(True):
    wide = {n: np.asarray(v, np.float64 if n in TRAINED else np.int32) for n, v in narrow.items()}
    wanted = value_and_gradients('reference', linear=True)(wide)
    assert found['y'].dtype == jnp.bfloat16 and found['weight'].dtype == jnp.float32
    assert found['w_up'].dtype == jnp.bfloat16
    # 8 bits of mantissa, twice where the hidden layer is rounded too.
    assert_equal(found, wanted, 2e-2)


@pytest.mark.parametrize('implementation', ON_A_CPU)
def test_inside_checkpoint_and_scan_over_layers(implementation):
  arrays = BY_NAME['one choice'].arrays('float32')
  weights = {n: np.stack([arrays[n], 0.5 * arrays[n]]) for n in ('w_gate', 'w_up', 'w_down')}

  def loss(implementation, weights, x):
    @jax.checkpoint
    def layer(x, w):
      return x + apply({**arrays, **w, 'x': x}, implementation), None

    return jnp.sum(jnp.sin(jax.lax.scan(layer, x, weights)[0]))

  gradients = lambda name: jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1)))
  found, wanted = (gradients(n)(weights, arrays['x']) for n in (implementation, 'reference'))
  assert_equal({**found[0], 'x': found[1]}, {**wanted[0], 'x': wanted[1]}, 1e-5)


@pytest.mark.parametrize('implementation', (*ON_A_CPU, None))
def test_tokens_sharded_over_a_mesh_equal_one_device(implementation, make_mesh):
  """check_vma=True; the shared weights' gradients are summed over the devices."""
  mesh = make_mesh(data=4, expert=2)
  arrays = BY_NAME['uneven, some dropped'].arrays('float32')
  arrays['token'] = arrays['token'] % 64  # within the shard of 64 tokens
  split, shared = ('x', 'token', 'expert', 'weight'), ('w_gate', 'w_up', 'w_down')
  specs = {**{n: P('data') for n in split}, **{n: P() for n in shared}}
  sharded = jax.shard_map(
    lambda a: apply(a, implementation), mesh=mesh, in_specs=(specs,), out_specs=P('data')
  )

  def loss(trained, rest):
    y = sharded({**rest, **trained})
    return jnp.sum(jnp.sin(y)), y

  trained = {n: jnp.asarray(arrays[n]) for n in TRAINED}
  rest = {n: jnp.asarray(arrays[n]) for n in ('token', 'expert')}
  (_, y), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(trained, rest)
  single = {**arrays, 'token': np.arange(512, dtype=np.int32) // 2}
  wanted = value_and_gradients('reference')(single)
  assert_equal({'y': y, **gradients}, wanted, 1e-5)


def test_unknown_names_are_refused_with_the_known_ones():
  arrays = BY_NAME['one expert'].arrays('float32')
  with pytest.raises(
    ValueError, match="implementation='fast'.*'blocks', 'cpu', 'gpu', 'reference'"
  ):
    apply(arrays, 'fast')
  with pytest.raises(ValueError, match="activation='tanh'.*gelu, relu, relu2, silu"):
    apply(arrays, 'cpu', activation='tanh')


def test_shapes_that_do_not_belong_together_are_refused():
  arrays = BY_NAME['one choice'].arrays('float32')
  with pytest.raises(ValueError, match=r'w_gate.shape=\(4, 8, 12\), expected \(5, 8, 12\)'):
    apply(arrays, None, num_experts=5)
  short = {name: arrays[name][:65] for name in ('token', 'expert', 'weight')}
  with pytest.raises(ValueError, match=r'groups=T=96 \(token-major\) does not divide 65 rows'):
    apply({**arrays, **short}, None)


def test_types_of_eight_bits_are_unsupported():
  arrays = BY_NAME['one expert'].arrays('float32')
  with pytest.raises(Unsupported, match='w_up is float8_e4m3fn'):
    apply({**arrays, 'w_up': jnp.asarray(arrays['w_up'], jnp.float8_e4m3fn)}, None)
