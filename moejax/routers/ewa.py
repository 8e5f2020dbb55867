"""Random uniform partition: experts share the batch by lot, and their weights are drawn together until they are one
(Huang et al. 2023, "Experts weights averaging: a new general training scheme for vision transformers")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import context_key, only
from moejax.routers.thor import OneOrAll


@dataclasses.dataclass(frozen=True)
class PartitionScorer:
  """In training logits of which the softmax is one expert, T / E tokens for each by lot; else all zero.

  Attributes:
    num_experts: E.
  """

  num_experts: int

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Certain logits.

    Raises:
      ValueError: in training without `context.rng`.
    """
    shape = (x_bsd.shape[0], x_bsd.shape[1])
    if not context.train:
      return jnp.zeros((*shape, self.num_experts), x_bsd.dtype), None
    lot_bs = jax.random.uniform(context_key(context, 6, 'ewa'), shape, jnp.float32)
    if context.mask is not None:
      lot_bs = jnp.where(context.mask, lot_bs, 2)  # padding comes last
    order_t = jnp.argsort(lot_bs.reshape(-1), stable=True)
    rank_t = (
      jnp.zeros_like(order_t)
      .at[order_t]
      .set(jnp.arange(order_t.size, dtype=order_t.dtype), unique_indices=True)
    )
    expert_bs = (rank_t % self.num_experts).reshape(shape).astype(jnp.int32)
    return only(expert_bs, self.num_experts, x_bsd.dtype), None


def ewa(*, d_model: int, num_experts: int, rngs: nnx.Rngs) -> Router:
  """Every expert has T / E random tokens of a training batch (one more where that does not divide), weight one.

  No parameters, no loss. After every step `moejax.moe.averaging.average_experts` moves the experts towards each
  other, and after training `collapse` makes them the one feed-forward layer of a dense model. Evaluation before that
  is the mean of all experts' outputs, E times the work: what the collapsed layer comes close to as experts agree.

  Args:
    d_model: unused.
    num_experts: E.
    rngs: unused.
  """
  return Router(
    PartitionScorer(num_experts),
    TokenAffinity('softmax', 1),
    OneOrAll(average=True),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True, prefix_safe_eval=True, batch_free=True, trains_router=False
    ),
    choices=1,
  )
