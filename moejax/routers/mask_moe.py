"""MaskMoE: every token id sees a fixed random subset of the experts, rare ids a single one (Su et al. 2024, "MaskMoE:
boosting token-level learning via routing mask in mixture-of-experts")."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.arrays import Context
from moejax.routers.router import Router, required, with_flags
from moejax.routers.scorers import Frozen, LinearScorer
from moejax.routers.top_k import token_choice


class MaskedScorer(nnx.Module):
  """Linear logits, -inf for experts that a token's id does not see.

  Args:
    d_model: D.
    num_experts: E.
    visible_v: how many experts every id sees.
    init_std: see `LinearScorer`.
    rngs: source of the kernel and of the mask.
  """

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    visible_v: Sequence[int] | np.ndarray,
    *,
    init_std: float | None = None,
    rngs: nnx.Rngs,
  ):
    self.linear = LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs)
    lot_ve = jax.random.uniform(rngs.params(), (len(visible_v), num_experts), jnp.float32)
    rank_ve = jnp.argsort(jnp.argsort(lot_ve, -1), -1)
    self.table = Frozen(rank_ve < jnp.asarray(visible_v, rank_ve.dtype)[:, None])

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Masked logits.

    Raises:
      ValueError: without `context.token_ids`.
    """
    seen_bse = self.table[...][required(context, 'token_ids', 'mask_moe')]
    logits_bse, _ = self.linear(x_bsd, context)
    return jnp.where(seen_bse, logits_bse, -jnp.inf), None


def frequent_ids(counts: Sequence[int], mass: float) -> Bool[np.ndarray, ' V']:
  """The fewest ids whose counts are at least `mass` of all: what counts as frequent."""
  counts_v = np.asarray(counts, np.float64)
  order_v = np.argsort(-counts_v, kind='stable')
  before_v = np.cumsum(counts_v[order_v]) - counts_v[order_v]
  frequent_v = np.zeros(len(counts_v), bool)
  frequent_v[order_v] = before_v < mass * counts_v.sum() * (1 - 1e-12)
  return frequent_v


def mask_moe(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 1,
  visible: int | None = None,
  counts: Sequence[int] | None = None,
  vocab_size: int | None = None,
  frequent_mass: float = 0.8,
  init_std: float | None = None,
  **options,
) -> Router:
  """Top-k among the experts that a token's id sees: `softmax(x W + mask[id])`.

  An id with one expert is hashed: its weight is 1, without gradient for the router. Masks are drawn once, are in the
  checkpoint, and the same in training and evaluation. With one visible expert for all ids this is a hash layer, with
  E plain `top_k`. Balance losses use the masked probabilities. Where the paper cuts frequent from rare, and how
  many experts it shows frequent ids, is not known to us: both are options without a published value.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the kernel and the masks.
    k: choices of a token; those beyond what its id sees are not made.
    visible: experts that frequent ids see; default E / 2.
    counts: how often every id occurs in the data, `[V]`; None where all ids count as frequent.
    vocab_size: V where there are no counts.
    frequent_mass: frequent are the fewest ids that make up this share of the counts; the others see one expert.
    init_std: see `LinearScorer`.
    options: of `token_choice`, but for the balancing bias.

  Raises:
    ValueError: an option out of its range, neither or both of counts and vocab_size; when called, no
      `context.token_ids`.
  """
  visible = max(1, num_experts // 2) if visible is None else visible
  if not 1 <= visible <= num_experts:
    raise ValueError(
      f'visible={visible} with num_experts={num_experts}: accepted are 1 to {num_experts}'
    )
  if (counts is None) == (vocab_size is None):
    raise ValueError(
      f'vocab_size={vocab_size} with counts of {None if counts is None else len(counts)} ids: accepted is one of both'
    )
  if not 0 <= frequent_mass <= 1:
    raise ValueError(f'frequent_mass={frequent_mass}: accepted are numbers from 0 to 1')
  frequent_v = (
    np.ones(vocab_size or 0, bool) if counts is None else frequent_ids(counts, frequent_mass)
  )
  scorer = MaskedScorer(
    d_model, num_experts, np.where(frequent_v, visible, 1), init_std=init_std, rngs=rngs
  )
  router = token_choice(scorer, num_experts=num_experts, k=k, **options)
  return with_flags(router, needs=('token_ids',))
