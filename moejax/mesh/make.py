"""One mesh for every strategy: axes `data`, `fsdp`, `expert` and `tensor`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

BATCH_AXES = ('data', 'fsdp', 'expert')
"""Mesh axes that the batch is sharded over."""

AXES = (*BATCH_AXES, 'tensor')
"""Mesh axes: experts are sharded over `expert`, hidden widths and heads over `tensor`, model widths over `fsdp`."""


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  expert: int = 1,
  tensor: int = 1,
  *,
  devices: Sequence[jax.Device],
) -> Mesh:
  """A mesh of `data * fsdp * expert * tensor` devices.

  Neighbours in `devices` are neighbours along the last axes, so those are the ones for fast networks: `tensor` moves
  most, then `expert`.

  Args:
    data, fsdp, expert, tensor: sizes; one of them may be -1, what is left of the devices.
    devices: the devices, in the order of the mesh.

  Raises:
    ValueError: sizes that do not fit the devices.
  """
  sizes = {'data': data, 'fsdp': fsdp, 'expert': expert, 'tensor': tensor}
  given = {axis: size for axis, size in sizes.items() if size != -1}
  for axis, size in given.items():
    if not isinstance(size, numbers.Integral) or size < 1:
      raise ValueError(f'mesh.{axis}={size}: accepted are integers from 1, or -1 for the rest')
  if len(given) < len(sizes) - 1:
    raise ValueError(f'mesh {sizes}: only one axis may be -1')
  product = math.prod(given.values())
  rest = len(devices) // product
  if product * (rest if len(given) < len(sizes) else 1) != len(devices):
    text = ' * '.join(f'{axis}={size}' for axis, size in sizes.items())
    raise ValueError(f'mesh {text} does not fit {len(devices)} devices')
  shape = tuple(sizes[axis] if axis in given else rest for axis in AXES)
  # unlike jax.make_mesh it cuts a dimension of a torus in two where an axis is shorter
  placed = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))
