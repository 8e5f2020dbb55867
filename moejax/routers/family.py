"""Language families: a sequence's family has an expert that always works (Zheng et al. 2024, "Efficiently
democratizing medical LLMs for 50 languages via a mixture of language family experts")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Router, required, with_flags
from moejax.routers.scorers import LinearScorer
from moejax.routers.top_k import token_choice


@dataclasses.dataclass(frozen=True)
class FamilyAffinity:
  """`TokenAffinity` with a selection score of infinity for the expert of the sequence's family."""

  function: str
  k: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    family_b = required(context, 'task', 'family')
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    own_be = jax.nn.one_hot(family_b, logits_bse.shape[-1], dtype=jnp.bool_)
    return dataclasses.replace(scores, select=jnp.where(own_be[:, None], jnp.inf, scores.select))


def family(
  *, d_model: int, num_experts: int, rngs: nnx.Rngs, k: int = 2, init_std: float | None = None
) -> Router:
  """Top-k of which one choice is the expert of the sequence's language family: hybrid-k routing.

  The family's expert comes first whatever its logit; the other k - 1 are the best by logits. Weights are a softmax over
  the chosen, so that the family's expert may have little. In the paper mixtures stand in the last layers alone
  (Post-MoE): `config.model.moe.layers='last_2'`.

  Args:
    d_model: D.
    num_experts: E, one for each family.
    rngs: source of the initial router kernel.
    k: choices of a token, from 2.
    init_std: see `LinearScorer`.

  Raises:
    ValueError: k out of its range; when called, no `context.task`, which names the family.
  """
  if k < 2:
    raise ValueError(
      f'k={k}: accepted are 2 to {num_experts}, one of them the expert of the family'
    )
  scorer = LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs)
  router = token_choice(scorer, num_experts=num_experts, k=k, affinity=FamilyAffinity)
  return with_flags(router, needs=('task',))
