"""SMILE: first a node, then an expert in it.

He et al. 2022, "SMILE: scaling mixture-of-experts with efficient bi-level routing"; the same shape as the hierarchical
gate of Shazeer et al. 2017, appendix B.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.top_k import TopKAssign
from moejax.routers.weighting import raw
from moejax.transformer.linear import product


class BilevelScorer(nnx.Module):
  """`logits[i m + j] = (x W1)_i + (x W2)_j` of n nodes with m experts each: the softmax over all is the product of
  the softmax over nodes and that over the experts of a node.

  Args:
    d_model: D.
    nodes: n.
    members: m.
    rngs: source of W1 and W2, the columns of one kernel `[D, n + m]`, truncated normal with variance 1 / D.
  """

  def __init__(self, d_model: int, nodes: int, members: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, nodes + members), jnp.float32))
    self.nodes = nodes

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits of all experts, those of a node side by side."""
    both = product(x_bsd, self.kernel[...].astype(x_bsd.dtype))
    node_bsg, member_bse = both[..., : self.nodes], both[..., self.nodes :]
    members = member_bse.shape[-1]
    return jnp.repeat(node_bsg, members, -1) + jnp.tile(member_bse, self.nodes), None


@dataclasses.dataclass(frozen=True)
class ClusterAffinity:
  """Softmax over all experts, which stand in clusters.

  Attributes:
    clusters: how many.
  """

  clusters: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity('softmax', 1)(logits_bse, std, bias_e, context)
    return dataclasses.replace(scores, clusters=self.clusters)


def smile(*, d_model: int, num_experts: int, rngs: nnx.Rngs, nodes: int = 2) -> Router:
  """`p = softmax(x W1)` over n nodes, `q = softmax(x W2)` over a node's m experts, top-1 of each, weight `p_i q_j`.

  All nodes share W2, so that the router has n + m columns instead of n m (whether the paper shares it is not known
  to us). With one node, or one expert a node, it is Switch without capacity. The paper adds a balance loss for each
  level: here `cluster_balance` (between nodes) and `member_balance` (within), 0.01 or so.

  Args:
    d_model: D.
    num_experts: E = n m.
    rngs: source of the initial router kernel.
    nodes: n.

  Raises:
    ValueError: nodes does not divide E.
  """
  if nodes < 1 or num_experts % nodes:
    raise ValueError(f'nodes={nodes} does not divide num_experts={num_experts}')
  return Router(
    BilevelScorer(d_model, nodes, num_experts // nodes, rngs=rngs),
    ClusterAffinity(nodes),
    TopKAssign(1, raw),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=1.0,
  )
