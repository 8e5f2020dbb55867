"""LocMoE's GrAP gate: fixed orthogonal gating vectors, the means of blocks of the token.

Li et al. 2024, "LocMoE: a low-overhead MoE for large language model training".
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Router, with_flags
from moejax.routers.top_k import token_choice


class BlockMeanScorer(nnx.Module):
  """`logits_e = relu(mean of the e-th of E equal blocks of x)`: no parameters.

  The gating vectors, E / D in one block and 0 elsewhere, are orthogonal.
  """

  def __init__(self, num_experts: int):
    self.num_experts = num_experts

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits from 0."""
    blocks = x_bsd.reshape(*x_bsd.shape[:2], self.num_experts, -1)
    return jax.nn.relu(jnp.mean(blocks, -1)), None


@dataclasses.dataclass(frozen=True)
class NodeAffinity:
  """`TokenAffinity` of experts that stand in nodes."""

  function: str
  k: int
  nodes: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    return dataclasses.replace(scores, clusters=self.nodes)


def locmoe(*, d_model: int, num_experts: int, rngs: nnx.Rngs, nodes: int = 1, **options) -> Router:
  """Top-1 of `softmax(relu(block means of x))`, weighted by it; nothing learnt.

  The layers below learn to steer it. Where all block means are negative the first expert is taken. The paper trains
  with `balance` (0.01) and `locality`, whose coefficient is not published: it draws tokens to the experts of the node
  that their sequence lies on, and needs `nodes`. Dropless without a `capacity_factor`; the paper's lower bound of the
  capacity, `exp(d^2 D / (2 - d^2)) / E` with d about 0.03, is not computed.

  Args:
    d_model: D.
    num_experts: E, a divisor of D.
    rngs: not used.
    nodes: how many the experts stand on, as many on each.
    options: of `token_choice`.

  Raises:
    ValueError: E does not divide D, nodes does not divide E, or as `token_choice`.
  """
  if d_model % num_experts:
    raise ValueError(f'num_experts={num_experts} does not divide d_model={d_model}')
  if nodes < 1 or num_experts % nodes:
    raise ValueError(f'nodes={nodes} does not divide num_experts={num_experts}')
  router = token_choice(
    BlockMeanScorer(num_experts),
    num_experts=num_experts,
    k=1,
    affinity=functools.partial(NodeAffinity, nodes=nodes),
    **options,
  )
  return with_flags(router, trains_router=False)
