"""The definitions of `exchange_matmul` and `matmul_exchange`: all rows travel, then all products; or the other way."""

import jax
import jax.numpy as jnp

from ..grouped_matmul import grouped_matmul
from ..ragged_all_to_all import move
from ..segments import up


def there(x_rd, rhs, route, travel, transpose_rhs):
  """See the contract in `__init__`; `travel` says how rows are moved."""
  x_rd = move(travel, x_rd, route)
  return tuple(
    grouped_matmul(x_rd, w, _sizes(route, travel, x_rd), transpose_rhs=transpose_rhs) for w in rhs
  )


def back(lhs, rhs, route, travel, transpose_rhs):
  """See the contract in `__init__`."""
  sizes = _sizes(route, travel, lhs[0])
  made = [
    grouped_matmul(x, w, sizes, transpose_rhs=transpose_rhs) for x, w in zip(lhs, rhs, strict=True)
  ]
  return move(travel, sum(made), route.back())


def _sizes(route, travel, x):
  """Rows of each expert of this device, with those between segments."""
  me = jax.lax.axis_index(travel.axis_name)
  ends = jnp.minimum(
    jnp.cumsum(jnp.sum(up(route.size[:, me]), axis=0, dtype=jnp.int32)), x.shape[0]
  )
  return jnp.diff(ends, prepend=0).astype(jnp.int32)
