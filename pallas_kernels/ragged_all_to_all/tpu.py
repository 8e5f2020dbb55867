"""`ragged_all_to_all` for TPUs: copies between the memories of the devices, all under way at once."""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import tpu_copies
from ..compat import struct_like

# Kernels that meet at a barrier in one program have numbers of their own.
COLLECTIVE = 17


def exchange(x_rd, route, *, static):
  """`[num_out_rows, D]`; rows outside of the segments are unspecified.

  Args:
    x_rd: rows to send.
    route: segments of all devices.
    static: axis and number of rows.

  Raises:
    Unsupported: see `__init__`.
  """
  out = jax.ShapeDtypeStruct((static.num_out_rows, x_rd.shape[1]), x_rd.dtype)
  tpu_copies.check('ragged_all_to_all', x=x_rd, out=out)
  scalars = tpu_copies.tables(route, static.axis_name)
  in_memory = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(_kernel, axis_name=static.axis_name, axes=tpu_copies.axes()),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(1,),
      in_specs=[in_memory],
      out_specs=in_memory,
      scratch_shapes=tpu_copies.semaphores(route.size.shape[2]),
    ),
    out_shape=struct_like(out.shape, out.dtype, x_rd),
    compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE, has_side_effects=True),
    name='ragged_all_to_all',
  )(*scalars, x_rd)


def _kernel(*refs, axis_name, axes):
  *scalars, x, out, sent, arrived = refs
  tables = tpu_copies.Tables(*scalars)
  copies = tpu_copies.Copies(tables, x, out, sent, arrived, axis_name, axes)
  copies.meet()
  copies.send_all()
  copies.wait_sent()
  copies.wait_for_all()
