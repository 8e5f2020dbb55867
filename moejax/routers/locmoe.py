"""LocMoE's GrAP gate: fixed orthogonal gating vectors, the means of blocks of the token.

Li et al. 2024, "LocMoE: a low-overhead MoE for large language model training", section 3.1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.top_k import TopKAssign
from moejax.routers.weighting import raw


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


def locmoe(*, d_model: int, num_experts: int, rngs: nnx.Rngs) -> Router:
  """Top-1 of `softmax(relu(block means of x))`, weighted by it; dropless, nothing learnt.

  The layers below learn to steer it. Where all block means are negative the first expert is taken. The paper's loss
  `mu KL(D_c || D_l)` for locality is not there (mu is not published), nor its capacity bound.

  Args:
    d_model: D.
    num_experts: E, a divisor of D.
    rngs: not used.

  Raises:
    ValueError: E does not divide D.
  """
  if d_model % num_experts:
    raise ValueError(f'num_experts={num_experts} does not divide d_model={d_model}')
  return Router(
    BlockMeanScorer(num_experts),
    TokenAffinity('softmax', 1),
    TopKAssign(1, raw),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True, prefix_safe_eval=True, batch_free=True, trains_router=False
    ),
    choices=1.0,
  )
