"""Routing metadata: which experts a token takes, and where the rows of each expert lie. No sort of scores or rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .. import registry
from ..packed import iota, take
from . import reference

NAMES = ('blocks', 'cpu', 'gpu', 'reference', 'tpu')


class Packing(NamedTuple):
  """Rows packed by expert, those of one expert in their old order, dropped rows last.

  Attributes:
    order: int32 `[R]`, row at each packed position.
    position: int32 `[R]`, packed position of each row: the inverse of `order`.
    starts: int32 `[E + 1]`, first packed position of each expert, then the number of kept rows.
  """

  order: Array
  position: Array
  starts: Array


class Layout(NamedTuple):
  """Rows laid out in tiles that each belong to one expert; there are `R // tile + E` tiles.

  Attributes:
    row: int32 `[tiles * tile]`, row at each place, -1 where there is none.
    place: int32 `[R]`, place of each row, `tiles * tile` for dropped rows.
    sizes: int32 `[E]`, rows of each expert.
    starts: int32 `[E + 1]`, first place of each expert, a multiple of `tile`, then the end of the last.
    expert: int32 `[tiles]`, expert of each tile, ascending; E for unused tiles.
  """

  row: Array
  place: Array
  sizes: Array
  starts: Array
  expert: Array


def top_k(
  logits: Float[Array, 'T E'], k: int, *, implementation: str | None = None
) -> tuple[Float[Array, 'T K'], Int32[Array, 'T K']]:
  """The `k` most probable experts of each token: `(softmax(logits)[t, expert[t, j]], expert)`, best first.

  Equal logits: the lowest index first. A NaN of either sign counts as larger than any number, and makes all
  probabilities of its token NaN: it is seen, and stays in its token. An expert at -inf has probability zero and
  comes last; a token whose logits are all -inf has NaN probabilities, as `jax.nn.softmax` gives it. Probabilities
  are float32 (float64 for float64); gradients flow from them through the whole softmax.

  Raises:
    ValueError: an unknown implementation, or not 1 <= k <= E.
    Unsupported: a type narrower than 16 bits or no floating type; for 'tpu' float64, or more than 1024 experts;
      for 'gpu' float64, no tokens, or more than 256 experts.
  """
  registry.check_name('top_k', implementation, NAMES)
  registry.check_dtypes('top_k', logits=logits)
  if not 1 <= k <= logits.shape[1]:
    raise ValueError(f'{k=}: accepted are 1 to {logits.shape[1]}, the number of experts')
  if implementation == 'reference':
    return reference.top_k(logits.astype(registry.accumulator(logits)), k)
  return _top_k(k, implementation, logits.astype(registry.accumulator(logits)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _top_k(k, implementation, logits):
  return registry.run(__name__, 'top_k', implementation, logits, k=k)


def _forward(k, implementation, logits):
  prob, expert = _top_k(k, implementation, logits)
  return (prob, expert), (logits, prob, expert)


def _backward(k, implementation, residuals, cotangents):
  """dlogits = p * (dp - <dp, p>), where dp is zero but for the chosen."""
  logits, prob, expert = residuals
  dprob = cotangents[0]
  chosen = expert[:, :, None] == iota(logits.shape[1])[None, None, :]
  dprob_te = jnp.sum(jnp.where(chosen, dprob[:, :, None], 0), axis=1)
  mean = jnp.sum(dprob * prob, axis=1, keepdims=True)
  return (jax.nn.softmax(logits, axis=1) * (dprob_te - mean),)


_top_k.defvjp(_forward, _backward)


def pack(
  expert: Int32[Array, 'R'], num_experts: int, *, implementation: str | None = None
) -> Packing:
  """Packs rows by expert, stably; an expert of `num_experts` or above means dropped.

  Ranks come from counts: of equal rows before a row in its block, and of those in the blocks before.

  Raises:
    ValueError: an unknown implementation.
    Unsupported: for 'tpu' more than 2^24 rows (counts are exact in float32) or 1024 experts; for 'gpu' no rows or more
      than 1024 experts.
  """
  registry.check_name('pack', implementation, NAMES)
  if implementation == 'reference':
    return Packing(*reference.pack(expert, num_experts=num_experts))
  return Packing(*registry.run(__name__, 'pack', implementation, expert, num_experts=num_experts))


def lay_out(
  expert: Int32[Array, 'R'], num_experts: int, tile: int, *, implementation: str | None = None
) -> Layout:
  """Packs rows by expert and begins each expert at a multiple of `tile`.

  Raises:
    ValueError: an unknown implementation, or `tile` below 1.
    Unsupported: as `pack`.
  """
  if tile < 1:
    raise ValueError(f'{tile=}: at least 1 row')
  packing = pack(expert, num_experts, implementation=implementation)
  tiles = expert.shape[0] // tile + num_experts
  sizes = packing.starts[1:] - packing.starts[:-1]
  starts = jnp.pad(jnp.cumsum((sizes + tile - 1) // tile * tile, dtype=jnp.int32), (1, 0))
  expert_w = jnp.searchsorted(starts[1:], iota(tiles) * tile, side='right').astype(jnp.int32)

  expert_p = jnp.repeat(jnp.minimum(expert_w, num_experts - 1), tile)
  rank_p = iota(tiles * tile) - take(starts, expert_p)
  held = rank_p < take(sizes, expert_p)
  packed_p = jnp.where(held, take(packing.starts, expert_p) + rank_p, 0)
  row = jnp.where(held, take(packing.order, packed_p), -1)

  kept = expert < num_experts
  expert_r = jnp.minimum(expert, num_experts - 1)
  place = packing.position - take(packing.starts, expert_r) + take(starts, expert_r)
  return Layout(row, jnp.where(kept, place, tiles * tile), sizes, starts, expert_w)
