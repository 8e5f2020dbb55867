"""The definition of `ragged_all_to_all`: every device gathers the rows of all, and takes its own."""

import jax
import jax.numpy as jnp

from ..packed import iota


def exchange(x_rd, sizes, axis_name, num_out_rows, chunk):
  """See the contract in `__init__`; one pair of devices after the other."""
  devices, (num_rows, _) = sizes.shape[0], x_rd.shape
  me, everything = jax.lax.axis_index(axis_name), jax.lax.all_gather(x_rd, axis_name)
  mine = iota(num_out_rows)
  begin = jnp.zeros_like(sizes[0, 0])
  out = jnp.zeros((num_out_rows, x_rd.shape[1]), x_rd.dtype)
  for source in range(devices):
    size = sizes[source, me]
    before = jnp.where(iota(devices) < me, -(-sizes[source] // chunk) * chunk, 0)
    row = mine - begin + jnp.sum(before, dtype=jnp.int32)
    here = (mine >= begin) & (mine < begin + size) & (row < num_rows)
    found = everything[source].at[jnp.clip(row, 0, num_rows - 1)].get(mode='promise_in_bounds')
    out = jnp.where(here[:, None], found, out)
    begin = begin - -size // chunk * chunk
  return out
