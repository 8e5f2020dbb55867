"""Hash layers: the expert is a fixed function of the token id (Roller et al. 2021, "Hash layers for large sparse
models")."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from moejax.arrays import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router, previous_ids, required
from moejax.routers.scorers import Frozen, only
from moejax.routers.top_k import TopKAssign, check_name
from moejax.routers.weighting import unweighted

KEYS = ('token', 'previous', 'bigram')


class HashScorer(nnx.Module):
  """Logits that are 0 at the expert of a token and -inf elsewhere.

  Args:
    num_experts: E.
    of: what is hashed, see `hash_layer`.
    counts: how often every token id occurs, `[V]`; None for a hash that does not ask.
    rngs: source of the hash's seed.
  """

  def __init__(
    self, num_experts: int, of: str, counts: Sequence[int] | None = None, *, rngs: nnx.Rngs
  ):
    self.num_experts = num_experts
    self.of = of
    table = None if counts is None else jnp.asarray(balanced_table(counts, num_experts))
    self.seed = Frozen(jax.random.bits(rngs.params(), dtype=jnp.uint32))
    self.table = None if table is None else Frozen(table)

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Certain logits.

    Raises:
      ValueError: without `context.token_ids`.
    """
    ids_bs = required(context, 'token_ids', 'hash')
    if self.table is not None:
      expert_bs = self.table[...][ids_bs]
    else:
      hashed_bs = ids_bs if self.of == 'token' else previous_ids(context)
      code_bs = _mix(_bits(hashed_bs) ^ self.seed[...])
      if self.of == 'bigram':
        code_bs = _mix(code_bs ^ _bits(ids_bs))
      expert_bs = (code_bs % jnp.uint32(self.num_experts)).astype(jnp.int32)
    return only(expert_bs, self.num_experts, x_bsd.dtype), None


def balanced_table(counts: Sequence[int], num_experts: int) -> Int[np.ndarray, ' V']:
  """Id -> expert: ids by falling count, each to the expert with the least so far (ties: the lowest id, expert)."""
  load_e = np.zeros(num_experts, np.int64)
  table = np.zeros(len(counts), np.int32)
  for index in np.argsort(-np.asarray(counts, np.int64), kind='stable'):
    table[index] = load_e.argmin()
    load_e[table[index]] += max(counts[index], 1)
  return table


def _bits(ids: Array) -> UInt32[Array, '*batch']:
  return jax.lax.bitcast_convert_type(ids.astype(jnp.int32), jnp.uint32)


def _mix(code: Array) -> UInt32[Array, '*batch']:
  """A bijection of 32 bits in which every input bit moves every output bit (the finalizer of MurmurHash3)."""
  code = (code ^ (code >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
  code = (code ^ (code >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
  return code ^ (code >> jnp.uint32(16))


def hash_layer(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  of: str = 'token',
  counts: Sequence[int] | None = None,
) -> Router:
  """`y = F_e(x)` with `e = hash(token id)`: no weight, no parameters, no loss (Roller et al., section 3.1).

  A random hash is a fixed pseudo-random function of ids of any vocabulary, with a seed of its own in every layer;
  the paper's is a table. The paper also splits an expert's hidden units over several hashes, which is not here, and
  has a hash of the next token, an upper bound that no model can use. It replaces a single layer.

  Args:
    d_model: unused.
    num_experts: E.
    rngs: source of the hash's seed.
    of: 'token', the token's own id; 'previous', that of the token before it in its document; 'bigram', both.
    counts: how often every token id occurs in the data, `[V]`: balanced hash, ids in order of falling counts, each
      to the expert with the least so far. With `of='token'` only; without it the hash is random.

  Raises:
    ValueError: an unknown `of`, counts that are empty or go with another `of`; when called, no `context.token_ids`.
  """
  check_name('of', of, KEYS)
  if counts is not None and (of != 'token' or len(counts) == 0):
    raise ValueError(
      f"of={of!r} with counts of {len(counts)} ids: accepted are one count an id with of='token', or None"
    )
  return Router(
    HashScorer(num_experts, of, counts, rngs=rngs),
    TokenAffinity('softmax', 1),
    TopKAssign(1, unweighted),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True,
      prefix_safe_eval=True,
      batch_free=True,
      trains_router=False,
      needs=('token_ids',),
      needs_past=of != 'token',
    ),
    choices=1,
  )
