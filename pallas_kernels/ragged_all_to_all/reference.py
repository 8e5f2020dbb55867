"""The definition of `ragged_all_to_all`: every device gathers the rows of all, and takes its own."""

import jax
import jax.numpy as jnp

from .. import segments


def exchange(x_rd, route, axis_name, num_out_rows):
  """See the contract in `__init__`; each row of the result looks for its segment."""
  held = segments.received(route, jax.lax.axis_index(axis_name))
  inside = held.inside(num_out_rows)
  segment = jax.lax.argmax(inside, 1, jnp.int32)
  row = held.origin[segment] + jnp.arange(num_out_rows, dtype=jnp.int32) - held.first[segment]
  source = segment // route.size.shape[2]
  found = jax.lax.all_gather(x_rd, axis_name).at[source, row].get(mode='clip')
  return jnp.where(jnp.any(inside, axis=1)[:, None], found, jnp.zeros_like(found))
