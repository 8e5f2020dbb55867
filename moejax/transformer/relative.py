"""Relative position biases (Raffel et al. 2020, T5, section 2.1): a learnt number a head and bucket of distances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moejax.transformer.linear import embed_init, master_dtype

NUM_BUCKETS, MAX_DISTANCE = 32, 128  # of T5, and of what follows it


def buckets(
  distance: np.ndarray,
  *,
  causal: bool,
  num_buckets: int = NUM_BUCKETS,
  max_distance: int = MAX_DISTANCE,
) -> np.ndarray:
  """The bucket of every distance, key minus query in tokens.

  A causal model has all buckets for the past, and the future shares the bucket of distance 0; else the second half of
  them is for the future. Half of the buckets of a side are of one distance each, the others grow geometrically up to
  `max_distance`, beyond which all distances share the last one.
  """
  back = np.maximum(-distance, 0) if causal else np.abs(distance)
  side = num_buckets if causal else num_buckets // 2
  exact = side // 2
  ratio = np.log(np.maximum(back, 1) / exact) / np.log(max_distance / exact)
  # a bound may be a whole distance, as 16 = 8 * 16^(2/8) is: rounding must not fall short of it
  far = np.minimum(exact + np.floor(ratio * (side - exact) + 1e-9).astype(np.int64), side - 1)
  found = np.where(back < exact, back, far)
  return found if causal else found + np.where(distance > 0, side, 0)


class RelativeBias(nnx.Module):
  """What attention adds to the scores of every head, a function of the distance between query and key alone.

  Each layer has a table of its own, as in expert choice (Zhou et al. 2022, section 4.1); T5 shares that of its first
  layer. Scores stay divided by the root of the head's width, which T5 leaves out.

  Args:
    num_heads: N.
    causal: see `buckets`.
  """

  def __init__(self, num_heads: int, *, causal: bool, dtype=jnp.float32, rngs: nnx.Rngs):
    self.causal = causal
    table = embed_init(rngs.params(), (NUM_BUCKETS, num_heads), master_dtype(dtype))
    self.relative_positions = nnx.Param(table)

  def __call__(self, length: int) -> Float[Array, 'N S S']:
    """For every head, query and key of a row of `length` tokens."""
    distance = np.arange(1 - length, length)
    of_distance = self.relative_positions[...][buckets(distance, causal=self.causal)].T
    return toeplitz(of_distance)


def toeplitz(of_distance: Float[Array, 'N distances']) -> Float[Array, 'N S S']:
  """Entry (n, i, j) is `of_distance[n, j - i + S - 1]`; made by reshapes, whose gradient is a sum without scatter."""
  heads, length = of_distance.shape[0], (of_distance.shape[1] + 1) // 2
  # from distance 0 on, the negative ones last, and one place between that shifts every row by one
  ring = jnp.roll(jnp.pad(of_distance, ((0, 0), (0, 1))), length + 1, axis=1)  # [N, 2 S]
  rows = jnp.broadcast_to(ring[:, None, :], (heads, length, 2 * length)).reshape(heads, -1)
  rows = rows[:, : length * (2 * length - 1)].reshape(heads, length, 2 * length - 1)
  return jax.lax.slice_in_dim(rows, 0, length, axis=2)
