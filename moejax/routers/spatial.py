"""Spatial mixtures: experts by place, whatever stands there (Dryden & Hoefler 2022, "Spatial mixture-of-experts")."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.classified import Classified
from moejax.routers.router import Router
from moejax.routers.scorers import check_from_one
from moejax.routers.top_k import token_choice


class PlaceScorer(nnx.Module):
  """A learnt logit for every position and expert.

  Args:
    num_experts: E.
    positions: how many places there are.
    bound: of the initial values, uniform.
    rngs: their source.
  """

  def __init__(self, num_experts: int, positions: int, bound: float, *, rngs: nnx.Rngs):
    shape = (positions, num_experts)
    table = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
    self.kernel = nnx.Param(table)

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits.

    Raises:
      ValueError: more positions than the table has.
    """
    table = self.kernel[...].astype(x_bsd.dtype)
    num_sequences, num_positions = x_bsd.shape[:2]
    if num_positions > table.shape[0]:
      raise ValueError(f'positions={table.shape[0]} of spatial with sequences of {num_positions}')
    if context.positions is not None:
      return table[context.positions], None
    shape = (num_sequences, num_positions, table.shape[1])
    return jnp.broadcast_to(table[None, :num_positions], shape), None


def spatial(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  positions: int = 1024,
  weighting: str | None = None,
  quantile: float | None = None,
  damping: float = 0.0,
  **options,
) -> Router:
  """Top-k of a learnt table `[S, E]` that does not look at the tokens (section 3.1 of the paper).

  The initial values are uniform within sqrt(3 E / k). The paper adds up its experts, local convolutions, without
  weights ('unweighted'), and teaches the table by which places have large errors: `quantile=0.7` with
  `weighting='unweighted'` and the loss `guidance` (see moejax/routers/classified.py). By default the table learns
  through the weights.

  Args:
    d_model: unused.
    num_experts: E.
    rngs: source of the table.
    k: experts of a place.
    positions: how many places there are, at least the patches of an image.
    quantile: experts of a place are wrong where its error is above this quantile; None: nothing is learnt of errors.
    damping: factor on the errors of these, 0 in the paper; only with a quantile.
    weighting, options: of `token_choice`.

  Raises:
    ValueError: positions below 1, quantile or damping out of [0, 1], or as `token_choice`; when called, longer
      sequences.
  """
  check_from_one(positions=positions)
  for name, value in (('quantile', quantile), ('damping', damping)):
    if value is not None and not 0 <= value <= 1:
      raise ValueError(f'{name}={value}: accepted are numbers from 0 to 1')
  bound = math.sqrt(3 * num_experts / max(k, 1))
  scorer = PlaceScorer(num_experts, positions, bound, rngs=rngs)
  router = token_choice(scorer, num_experts=num_experts, k=k, weighting=weighting, **options)
  if quantile is not None:
    router.feedback = Classified(quantile, damping)
  return router
