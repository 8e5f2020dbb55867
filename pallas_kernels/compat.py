"""Varying manual axes: what `jax.shard_map(..., check_vma=True)` knows of a value; names differ by version."""

import jax
import jax.numpy as jnp


def varying_axes(x: jax.Array) -> frozenset[str]:
  """The mesh axes over which `x` differs from device to device; empty outside of shard_map."""
  kind = jax.typeof(x)
  if hasattr(kind, 'manual_axis_type'):
    return frozenset(kind.manual_axis_type.varying)
  return frozenset(kind.vma)


def vary_together(*arrays):
  """Makes all arrays vary over the axes that any of them varies over; None stays None.

  Loop carries must not change their type. Autodiff of this step sums the gradient of a weight that devices
  share over those devices.
  """
  axes = frozenset().union(*(varying_axes(x) for x in arrays if x is not None))
  return tuple(_vary(x, axes) for x in arrays)


def zeros_like_varying(shape, dtype, like: jax.Array) -> jax.Array:
  """Zeros that vary over the axes of `like`: the start of a loop carry."""
  return _vary(jnp.zeros(shape, dtype), varying_axes(like))


def struct_like(shape, dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
  """The type of a result of a Pallas call, which varies over the axes of `like`."""
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def vary_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """`x`, varying over the axes of `like` too: Mosaic GPU kernels of jax 0.10 forget the type they are given."""
  return _vary(x, varying_axes(like) | varying_axes(x))


def _vary(x, axes):
  missing = () if x is None else tuple(sorted(axes - varying_axes(x)))
  return jax.lax.pcast(x, missing, to='varying') if missing else x
