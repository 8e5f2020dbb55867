"""Meshes of the simulated devices."""

import jax
import pytest
from jax.sharding import AxisType

from moejax.mesh.make import AXES, make_mesh


def test_minus_one_takes_the_rest_and_axes_are_automatic():
  mesh = make_mesh(data=-1, expert=4, devices=jax.devices())
  assert dict(mesh.shape) == {'data': 2, 'fsdp': 1, 'expert': 4, 'tensor': 1}
  assert mesh.axis_names == AXES
  assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'expert': 3}, 'does not fit 8 devices'),
    ({'data': 2, 'fsdp': 2, 'expert': 4}, 'does not fit 8 devices'),
    ({'data': 4}, 'does not fit 8 devices'),
    ({'fsdp': -1}, 'only one axis may be -1'),
    ({'expert': 0}, 'mesh.expert=0: accepted are integers from 1'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    make_mesh(**sizes, devices=jax.devices())
