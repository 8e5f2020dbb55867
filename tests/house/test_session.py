"""The session of conftest.py: eight devices, strict numerics, shapes checked at public borders."""

import sys

import jax
import jax.numpy as jnp
import pytest


def test_the_session_has_eight_devices_and_strict_numerics():
  assert jax.device_count() >= 8 or jax.default_backend() != 'cpu'
  with pytest.raises(ValueError, match='rank_promotion'):
    jnp.ones((2, 3)) + jnp.ones(3)
  with pytest.raises(ValueError, match='promotion'):
    jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_relaxed_promotion_lasts_one_test(standard_promotion):
  assert (jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


def test_float64_lasts_one_test(x64):
  assert jnp.ones(3, 'float64').dtype == jnp.float64


def test_shapes_are_checked_in_the_library_but_not_in_records():
  hooks = [hook for hook in sys.meta_path if hasattr(hook, 'should_instrument')]
  for name, checked in {'moejax.moe.dispatch': True, 'moejax.arrays': False, 'jax': False}.items():
    assert any(hook.should_instrument(name) for hook in hooks) == checked


def test_a_mesh_has_automatic_axes(make_mesh):
  mesh = make_mesh(data=2, expert=4)
  assert dict(mesh.shape) == {'data': 2, 'expert': 4}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
