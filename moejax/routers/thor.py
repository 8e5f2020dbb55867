"""THOR: experts drawn at random, kept alike by a consistency loss (Zuo et al. 2022, "Taming sparsely activated
transformer with stochastic experts")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.dense import assign_all
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import Frozen, context_key, only
from moejax.routers.top_k import TopKAssign, check_name
from moejax.routers.weighting import unweighted

EVALS = ('token', 'sequence', 'average')


class DrawScorer(nnx.Module):
  """Logits of which the softmax is one drawn expert; all zero in evaluation by 'average'.

  Args:
    num_experts: E.
    evaluation: see `thor`.
    rngs: source of the seed for evaluation without a key.
  """

  def __init__(self, num_experts: int, evaluation: str, *, rngs: nnx.Rngs):
    self.num_experts = num_experts
    self.evaluation = evaluation
    self.seed = Frozen(jax.random.bits(rngs.params(), dtype=jnp.uint32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Certain logits.

    Raises:
      ValueError: in training without `context.rng`.
    """
    shape = (x_bsd.shape[0], x_bsd.shape[1])
    drawn = {'token': shape, 'sequence': (shape[0], 1)}.get(self.evaluation, (1, 1))
    if context.train:
      key, drawn = context_key(context, 5, 'thor'), (1, 1)
    elif self.evaluation == 'average':
      return jnp.zeros((*shape, self.num_experts), x_bsd.dtype), None
    else:
      key = jax.random.key(self.seed[...]) if context.rng is None else context_key(context, 5, '')
    expert = jax.random.randint(key, drawn, 0, self.num_experts, jnp.int32)
    expert_bs = jnp.broadcast_to(expert, shape)
    return only(expert_bs, self.num_experts, x_bsd.dtype), None


@dataclasses.dataclass(frozen=True)
class OneOrAll:
  """The drawn expert with weight one; outside of training all experts where `average`."""

  average: bool

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    if self.average and not context.train:
      return assign_all(scores, context)
    return TopKAssign(1, unweighted)(scores, context)


def thor(*, d_model: int, num_experts: int, rngs: nnx.Rngs, evaluation: str = 'token') -> Router:
  """One random expert for the whole batch in every training call, a layer's draws independent of the others'.

  No parameters, no weight, no balance. The paper runs two forward passes a step with draws of their own and adds
  `moejax.moe.averaging.consistency_loss` of their logits, times 1 to 5, to both cross-entropies; with one pass only
  this is a drop-out of experts.

  Args:
    d_model: unused.
    num_experts: E, 2 in the paper.
    rngs: source of the seed that evaluation uses where there is no `context.rng`.
    evaluation: 'token' or 'sequence', an expert drawn for each (the paper; the released script draws by sequence), or
      'average', the mean of all experts, E times the work.

  Raises:
    ValueError: an unknown evaluation.
  """
  check_name('evaluation', evaluation, EVALS)
  average = evaluation == 'average'
  return Router(
    DrawScorer(num_experts, evaluation, rngs=rngs),
    TokenAffinity('softmax', 1),
    OneOrAll(average),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True,
      prefix_safe_eval=True,
      batch_free=True,
      deterministic_eval=average,
      trains_router=False,
    ),
    choices=1,
  )
