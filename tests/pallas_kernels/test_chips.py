"""A body asked for by name on a chip that it is not made for is refused before it is lowered."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import Unsupported, chips, grouped_matmul


def device(kind, platform='gpu', **known):
  return types.SimpleNamespace(device_kind=kind, platform=platform, **known)


H200 = device('NVIDIA H200', compute_capability='9.0')
V5P = device('TPU v5p', 'tpu')
CPU = device('cpu', 'cpu')


@pytest.mark.parametrize(
  ('body', 'where'),
  [
    ('gpu', device('NVIDIA A100-SXM4-80GB', compute_capability='8.0')),
    ('gpu', device('NVIDIA B200', compute_capability='10.0')),
    ('gpu', device('AMD Instinct MI300X', compute_capability='gfx942')),
    ('gpu', device('NVIDIA A100-SXM4-80GB')),
    ('ampere', H200),
    ('ampere', device('NVIDIA H200')),
    ('ampere', device('Tesla V100-SXM2-16GB', compute_capability='7.0')),
    ('ampere', device('AMD Instinct MI300X', compute_capability='gfx942')),
    ('ampere', CPU),
    ('gpu', V5P),
    ('gpu', CPU),
    ('tpu', H200),
    ('tpu', CPU),
  ],
)
def test_a_body_is_refused_on_other_chips_with_the_chip(body, where):
  with pytest.raises(Unsupported, match=f"op: implementation='{body}' needs .* not .*") as error:
    chips.check_device('op', body, where)
  assert where.device_kind in str(error.value)


def test_each_body_runs_on_its_own_chip_and_those_of_xla_everywhere():
  for where in (H200, device('NVIDIA H100 80GB HBM3'), device('NVIDIA H20')):
    chips.check_device('op', 'gpu', where)
  for kind, capability in (('A100-SXM4-80GB', '8.0'), ('L4', '8.9'), ('RTX A6000', '8.6')):
    chips.check_device('op', 'ampere', device(f'NVIDIA {kind}', compute_capability=capability))
    chips.check_device('op', 'ampere', device(f'NVIDIA {kind}'))
  chips.check_device('op', 'tpu', V5P)
  for body in ('blocks', 'cpu', 'reference'):
    for where in (H200, V5P, CPU):
      chips.check_device('op', body, where)


def call(implementation, lhs):
  rhs, sizes = jnp.ones((2, 128, 128), lhs.dtype), jnp.array([1, 3], jnp.int32)
  return grouped_matmul(lhs, rhs, sizes, implementation=implementation).sum()


@pytest.mark.parametrize('body', ['gpu', 'tpu'])
def test_arrays_that_have_values_tell_their_chip(body):
  """In value and in gradient; what is only traced may be lowered elsewhere."""
  lhs = jnp.ones((4, 128), jnp.bfloat16)
  for run in (call, jax.grad(call, argnums=1)):
    with pytest.raises(Unsupported, match=f"grouped_matmul: implementation='{body}' needs"):
      run(body, lhs)
  assert jax.eval_shape(lambda lhs: call(body, lhs), lhs).shape == ()


@pytest.mark.parametrize(
  ('kind', 'platform', 'refused'),
  [('NVIDIA A100', 'gpu', 'gpu'), ('NVIDIA H200', 'gpu', 'tpu'), ('TPU v5p', 'tpu', 'gpu')],
)
def test_a_mesh_around_what_is_traced_tells_its_chips(kind, platform, refused):
  described = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  mesh = AbstractMesh((1,), ('data',), (AxisType.Auto,), abstract_device=described)
  lhs = jax.ShapeDtypeStruct((4, 128), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(Unsupported, match=kind):
      jax.eval_shape(lambda lhs: call(refused, lhs), lhs)
    assert jax.eval_shape(lambda lhs: call('blocks', lhs), lhs).shape == ()
    if kind != 'NVIDIA A100':
      own = {'gpu': 'gpu', 'tpu': 'tpu'}[platform]
      assert jax.eval_shape(lambda lhs: call(own, lhs), lhs).shape == ()
