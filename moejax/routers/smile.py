"""SMILE: first a node, then an expert in it.

He et al. 2022, "SMILE: scaling mixture-of-experts with efficient bi-level routing"; the same shape as the hierarchical
gate of Shazeer et al. 2017, appendix B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import softmax
from moejax.routers.router import Flags, Router
from moejax.routers.top_k import TopKAssign
from moejax.routers.weighting import raw
from moejax.transformer.linear import product


class BilevelScorer(nnx.Module):
  """`x W1` of n nodes, and beside it `x W2` of the m experts of a node.

  Args:
    d_model: D.
    outputs: n + m.
    rngs: source of W1 and W2, the columns of one kernel `[D, n + m]`, truncated normal with variance 1 / D.
  """

  def __init__(self, d_model: int, outputs: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, outputs), jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S O'], None]:
    """The n logits of the nodes, then the m of the places in any of them."""
    return product(x_bsd, self.kernel[...].astype(x_bsd.dtype)), None


@dataclasses.dataclass(frozen=True)
class BilevelAffinity:
  """Expert `i m + j` has the logit `(x W1)_i + (x W2)_j`: the softmax over all is the product of that over the nodes
  and that over the experts of a node, so that there are n + m exponentials a token and not n m.

  Attributes:
    nodes: n.
  """

  nodes: int

  def __call__(
    self, logits_bso: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    levels = logits_bso[..., : self.nodes], logits_bso[..., self.nodes :]
    (node_bsg, node_bs), (member_bsc, member_bs) = map(softmax, levels)
    logits_bse = _pairs(jnp.add, *levels)
    probs_bse = _pairs(jnp.multiply, node_bsg, member_bsc)
    partition_bs = node_bs + member_bs
    same = (logits_bse, logits_bse, probs_bse, probs_bse)
    return Scores(*same, partition=partition_bs, clusters=self.nodes)


def _pairs(combine: Callable[[Array, Array], Array], node: Array, member: Array) -> Array:
  """`[..., n], [..., m] -> [..., n m]`, the experts of a node side by side."""
  both = combine(node[..., :, None], member[..., None, :])
  return both.reshape(*node.shape[:-1], -1)


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
    BilevelScorer(d_model, nodes + num_experts // nodes, rngs=rngs),
    BilevelAffinity(nodes),
    TopKAssign(1, raw),
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=1.0,
  )
