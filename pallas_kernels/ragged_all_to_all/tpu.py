"""`ragged_all_to_all` for TPUs: copies between the memories of the devices, all under way at once."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..compat import struct_like
from ..registry import Unsupported
from . import CHUNK

# Kernels that meet at a barrier in one program have numbers of their own.
COLLECTIVE = 17


def exchange(x_rd, sent, received, put, *, static):
  """`[num_out_rows, D]`; rows outside of the segments are unspecified.

  Args:
    x_rd: rows to send.
    sent, received: Segments of this device.
    put: int32 `[P]`, first row that this device's segment has on each device.
    static: axis and number of rows.

  Raises:
    Unsupported: see `__init__`.
  """
  num_rows, width = x_rd.shape
  rows_fit = num_rows % CHUNK == 0 and static.num_out_rows % CHUNK == 0
  if str(x_rd.dtype) not in ('bfloat16', 'float32') or not rows_fit:
    raise Unsupported(
      f'ragged_all_to_all on TPU: x {x_rd.dtype}{x_rd.shape} into {static.num_out_rows} rows; bfloat16 and float32 '
      f'and multiples of {CHUNK} rows are supported'
    )
  scalars = sent.first, put, sent.chunks, jnp.sum(received.chunks, dtype=jnp.int32)[None]
  in_memory = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(_kernel, axis_name=static.axis_name, devices=put.shape[0]),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(1,),
      in_specs=[in_memory],
      out_specs=in_memory,
      scratch_shapes=[pltpu.SemaphoreType.DMA, pltpu.SemaphoreType.DMA],
    ),
    out_shape=struct_like((static.num_out_rows, width), x_rd.dtype, x_rd),
    compiler_params=pltpu.CompilerParams(collective_id=COLLECTIVE, has_side_effects=True),
    name='ragged_all_to_all',
  )(*scalars, x_rd)


def _kernel(take, put, chunks, expected, x, out, send_sem, recv_sem, *, axis_name, devices):
  me = jax.lax.axis_index(axis_name)
  _meet(axis_name, devices)

  def copy(device, source, target):
    rows = lambda ref, first: ref.at[pl.ds(pl.multiple_of(first, CHUNK), CHUNK)]
    return pltpu.make_async_remote_copy(
      rows(x, source), rows(out, target), send_sem, recv_sem, device_id={axis_name: device}
    )

  def send(i, total):
    # Each begins with another neighbour, so that no device gets all copies at once.
    device = jax.lax.rem(me + i, jnp.int32(devices))
    start = lambda c, _: copy(device, take[device] + c * CHUNK, put[device] + c * CHUNK).start()
    jax.lax.fori_loop(0, chunks[device], start, None)
    return total + chunks[device]

  total = jax.lax.fori_loop(jnp.int32(0), jnp.int32(devices), send, jnp.int32(0))
  # A wait takes one copy's bytes off a semaphore, whichever copy they were of.
  jax.lax.fori_loop(0, total, lambda i, _: copy(me, 0, 0).wait_send(), None)
  jax.lax.fori_loop(0, expected[0], lambda i, _: copy(me, 0, 0).wait_recv(), None)


def _meet(axis_name, devices):
  """No device writes into another's result before that one has come here."""
  barrier = pltpu.get_barrier_semaphore()
  for device in range(devices):
    pl.semaphore_signal(barrier, 1, device_id={axis_name: jnp.int32(device)})
  pl.semaphore_wait(barrier, devices)
