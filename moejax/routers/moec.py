"""Mixture of expert clusters: cosine gate, variance between clusters, dropout of experts within them.

Xie et al. 2022, "MoEC: mixture of expert clusters"; the gate is that of X-MoE, Chi et al. 2022, "On the
representation collapse of sparse mixture of experts".
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import softmax
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import check_from_one
from moejax.routers.top_k import TopKAssign
from moejax.transformer.linear import product


class ClusterScorer(nnx.Module):
  """`logits_e = cos(x W, phi_e) / tau`, tau learnt.

  Args:
    d_model: D.
    num_experts: E.
    width: of the space of the cosines.
    rngs: source of W, truncated normal with variance 1 / D, and of phi, orthogonal with gain 0.1.
  """

  def __init__(self, d_model: int, num_experts: int, width: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, width), jnp.float32))
    orthogonal = nnx.initializers.orthogonal(0.1)
    self.phi = nnx.Param(orthogonal(rngs.params(), (width, num_experts), jnp.float32))
    self.scale = nnx.Param(jnp.asarray(0.07, jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits in [-1 / tau, 1 / tau]; tau is at least 1e-4."""
    kernel, phi, tau = (p[...].astype(x_bsd.dtype) for p in (self.kernel, self.phi, self.scale))
    directions = _unit(phi, 0) / jnp.maximum(tau, 1e-4)
    return product(_unit(product(x_bsd, kernel), -1), directions), None


def _unit(x: Array, axis: int) -> Array:
  """Unit length; lengths below 1e-4 count as that."""
  return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(axis, keepdims=True), 1e-8))


@dataclasses.dataclass(frozen=True)
class ClusterGate:
  """Logits are what weights are made of; in training, selection among the experts that survive.

  Attributes:
    clusters: how many.
    dropout: fraction of each cluster that is dropped.
    resamples: how many times over the training survivors are drawn.
    seed: of the draws.
  """

  clusters: int
  dropout: float
  resamples: int
  seed: int

  def survivors(self, num_experts: int, progress: Float[Array, '']) -> Bool[Array, ' E']:
    """Who takes tokens after a fraction of the training steps: so many of every cluster, at least one."""
    members = num_experts // self.clusters
    kept = max(1, math.ceil(members * (1 - self.dropout) - 1e-9))
    period = jnp.floor(progress * self.resamples).astype(jnp.int32)
    key = jax.random.fold_in(jax.random.key(self.seed), period)
    draw = jax.random.uniform(key, (self.clusters, members), jnp.float32)
    rank = jnp.argsort(jnp.argsort(draw, -1), -1)
    return (rank < kept).reshape(-1)

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    select_bse = logits_bse
    if context.train and self.dropout:
      progress = jnp.ones((), jnp.float32) if context.progress is None else context.progress
      survives_e = self.survivors(logits_bse.shape[-1], progress)
      select_bse = jnp.where(survives_e[None, None], logits_bse, -jnp.inf)
    probs_bse, partition_bs = softmax(logits_bse)
    return Scores(
      logits_bse,
      select_bse,
      logits_bse,
      probs_bse,
      partition=partition_bs,
      clusters=self.clusters,
    )


def moec(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  clusters: int = 2,
  width: int = 32,
  dropout: float = 0.5,
  resamples: int = 100,
  seed: int = 0,
) -> Router:
  """Top-1 by the cosine gate, weight `sigmoid(cos / tau)`, dropless; E experts in consecutive clusters.

  The paper trains with `balance` and `cluster_contrast` (its coefficient type 2; type 1 is `cluster_variance`), both
  at 0.01. Known differences: the released code adds `(1 - weight) x` to the output, which the block's residual
  stands for here; its losses have the temperature fixed at 0.07 where this uses tau, 0.07 at the start; it draws the
  survivors every 250 updates where this counts by `context.progress`, and all layers draw alike.

  Args:
    d_model: D.
    num_experts: E; 64 in the paper.
    rngs: source of the initial parameters.
    clusters: a divisor of E; 8 in the paper.
    width: of the space of the cosines.
    dropout: fraction of the experts of every cluster that take no tokens, in training only.
    resamples: how many times over the training the survivors are drawn.
    seed: of these draws.

  Raises:
    ValueError: an option out of its range.
  """
  if clusters < 1 or num_experts % clusters:
    raise ValueError(f'clusters={clusters} does not divide num_experts={num_experts}')
  if not 0 <= dropout < 1:
    raise ValueError(f'dropout={dropout}: accepted are numbers from 0 to below 1')
  check_from_one(width=width, resamples=resamples)
  return Router(
    ClusterScorer(d_model, num_experts, width, rngs=rngs),
    ClusterGate(clusters, dropout, resamples, seed),
    TopKAssign(1, jax.nn.sigmoid),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=1.0,
  )
