"""Digests of leaves, whole and in parts; over two processes: tests/experiments/test_processes.py."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.digests import describe, differing

VALUES = np.arange(48, dtype=np.float32).reshape(2, 4, 6)


def in_parts(values):
  """The digest of the digests of the parts that two devices by three hold of the last two dimensions."""
  parts = [values[:, i : i + 2, j : j + 2] for i in (0, 2) for j in (0, 2, 4)]
  return hashlib.sha256(b''.join(hashlib.sha256(p.tobytes()).digest() for p in parts)).hexdigest()


def test_a_whole_leaf_has_the_digest_of_its_bytes_on_any_mesh():
  """As in checkpoints from before there were parts."""
  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  cut = jax.device_put(VALUES, NamedSharding(mesh, P(None, 'data')))
  want = ['float32', [2, 4, 6], hashlib.sha256(VALUES.tobytes()).hexdigest()]
  assert describe({'one': jnp.asarray(VALUES), 'cut': cut}) == {'one': want, 'cut': want}


@pytest.mark.parametrize('spec', [P(), P(None, 'data'), P('data')])
def test_parts_of_another_layout_are_made_again(spec):
  """What six devices of several processes wrote, on two devices of one."""
  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  described = {'w': ['float32', [2, 4, 6], in_parts(VALUES), [1, 2, 3]]}
  place = lambda values: {'w': jax.device_put(values, NamedSharding(mesh, spec))}
  assert differing(place(VALUES), described) is None
  for at in ((0, 0, 0), (1, 3, 5), (1, 2, 1)):
    changed = VALUES.copy()
    changed[at] += 1e-3
    assert differing(place(changed), described) == 'w'
  swapped = np.concatenate([VALUES[:, 2:], VALUES[:, :2]], 1)  # the same parts elsewhere
  assert differing(place(swapped), described) == 'w'


@pytest.mark.parametrize('changed', [VALUES.astype(np.int32), VALUES.reshape(4, 2, 6)])
def test_another_type_or_shape_is_another_leaf(changed):
  assert differing({'w': changed}, describe({'w': VALUES})) == 'w'
