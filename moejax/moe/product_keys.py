"""The k best of n^2 experts by two sets of n keys (Lample et al. 2019, "Large memory layers with product keys").

Expert `i * n + j` scores `first . keys[0, i] + second . keys[1, j]`. Both members of one of the k best pairs are among
the k best of their side, so n^2 scores are never made.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from moejax.moe.chunks import joined, split
from moejax.moe.largest import largest

CHUNK = 32
"""Tokens worked on at once, so that the scores of all their heads stay in a CPU's cache."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def retrieve(
  first: Float[Array, 'T N H'],
  second: Float[Array, 'T N H'],
  keys: Float[Array, '2 *N E H'],
  k: int,
) -> tuple[Float[Array, 'T N K'], Int[Array, 'T N K']]:
  """Scores and numbers of the k best experts of N heads, best first; `keys` are the heads' own, or one set for all.

  Gradients are sums over the k chosen keys: no array of tokens times keys is kept or made for them.
  """
  return _forward(first, second, keys, k)[0]


def _forward(first, second, keys, k):
  formula = 'NEH,TNH->ETN' if keys.ndim == 4 else 'EH,TNH->ETN'

  def one_chunk(_, halves):
    first, second = (
      jnp.einsum(formula, own, half, precision='highest')
      for half, own in zip(halves, keys, strict=True)
    )
    return None, [jnp.moveaxis(part, 0, -1) for part in product_top_k(first, second, k)]

  _, found = jax.lax.scan(one_chunk, None, split(CHUNK, first, second))
  score, expert = (joined(part, len(first)) for part in found)
  return (score, expert), (first, second, keys, expert)


def _backward(k, saved, gradients):
  first, second, keys, expert = saved
  side = keys.shape[-2]
  head = (jnp.arange(keys.shape[1], dtype=jnp.int32)[None, :, None],) if keys.ndim == 4 else ()

  def one_chunk(dkeys, chunk):
    *halves, expert, dscore = chunk
    places = (expert // side, expert % side)
    dhalves, sums = [], []
    for half, own, place, total in zip(halves, keys, places, dkeys, strict=True):
      chosen = own.at[(*head, place)].get(mode='promise_in_bounds')  # [T, N, K, H]
      dhalves.append((dscore[..., None] * chosen).sum(2))
      rows = dscore[..., None] * half[:, :, None]
      sums.append(total.at[(*head, place)].add(rows, mode='promise_in_bounds'))
    return sums, dhalves

  zeros = [jnp.zeros_like(own) for own in keys]
  chunks = split(CHUNK, first, second, expert, gradients[0])
  dkeys, dhalves = jax.lax.scan(one_chunk, zeros, chunks)
  return *(joined(half, len(first)) for half in dhalves), jnp.stack(dkeys)


retrieve.defvjp(_forward, _backward)


def product_top_k(
  first: Float[Array, 'E *batch'], second: Float[Array, 'E *batch'], k: int
) -> tuple[Float[Array, 'K *batch'], Int[Array, 'K *batch']]:
  """The k largest of all `first_i + second_j`, and their numbers `i * n + j`.

  Of equal sums, pairs with a larger `first_i` come first.
  """
  side = len(second)
  first, i = largest(first, k)
  second, j = largest(second, k)
  # Of the a-th best and the b-th best, (a + 1) (b + 1) - 1 pairs are as good or better and come before.
  most = [k // (a + 1) for a in range(k)]
  pairs = lambda one, other: jnp.concatenate(
    [one[a : a + 1] + other[:count] for a, count in enumerate(most)]
  )
  value, place = largest(pairs(first, second), k)
  return value, jnp.take_along_axis(pairs(i * side, j), place, 0, mode='promise_in_bounds')
