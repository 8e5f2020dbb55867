"""Tokens cut into chunks for a scan, and put together again."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def split(size: int, *arrays: Array) -> tuple[Array, ...]:
  """`[T, ...] -> [chunks, size, ...]`, filled up with zeros.

  Chunk c has the tokens `c, c + chunks, c + 2 chunks ...`, as many of every device that tokens are sharded over: a scan
  over chunks leaves them there.
  """
  return tuple(_split(min(size, len(a)), a) for a in arrays)


def _split(size: int, a: jax.Array) -> jax.Array:
  filled = jnp.pad(a, ((0, -len(a) % size), *((0, 0),) * (a.ndim - 1)))
  return filled.reshape(size, -1, *a.shape[1:]).swapaxes(0, 1)


def joined(chunks: Array, num_tokens: int) -> Array:
  """The inverse of `split`: `[chunks, size, ...] -> [T, ...]`."""
  return chunks.swapaxes(0, 1).reshape(-1, *chunks.shape[2:])[:num_tokens]
