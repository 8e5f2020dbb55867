"""PEER: retrieval of a few of up to a million experts, each a single hidden neuron.

He 2024, "Mixture of a million experts"; product keys: Lample et al. 2019, "Large memory layers with product keys".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.arrays import Aux, Context, RoutingStats, wide_dtype
from moejax.moe.entropy import entropy_terms
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.moe.neurons import neurons
from moejax.moe.product_keys import retrieve
from moejax.routers.router import Flags, as_batch
from moejax.sizes import check_made_of
from moejax.transformer.linear import LayerNorm, Linear, product
from pallas_kernels import check_activation, hidden

SCORES = {'relu': jax.nn.relu, 'sigmoid': jax.nn.sigmoid, 'softmax': jax.nn.softmax}


class Peer(nnx.Module):
  """`y = sum over heads, over the k experts i of a head: g_i act(u_i . x) v_i`.

  A head's query, in two halves, is compared with n keys each; expert `i * n + j` scores the sum of the i-th key with
  the first half and the j-th with the second. The k best of all n^2 are found among the k best of either side.
  All heads share the experts and, by default, the keys.

  Args:
    d_model: D.
    num_experts: n^2; 1024^2 in the paper.
    heads: N, 8 in the paper.
    k: K, experts of a head, 16 in the paper; G = heads * k neurons work on a token.
    query_width: width of a head's query, both halves.
    query_norm: layer normalisation of the queries. The paper has batch normalisation, which uses experts more evenly
      but makes outputs depend on the batch; False for none.
    keys_per_head: every head has keys of its own (lucidrains' code).
    score: g of the k chosen scores, 'softmax' (paper), 'sigmoid' or 'relu'.
    activation: of the neurons.
    losses: name -> coefficient, names of `moejax.moe.losses.LOSSES`; the paper has none.
    dtype: type of the neurons' computation; queries, keys and softmax are float32 always.
    out_scale: factor on the standard deviation of the initial v.
    rngs: source of the initial parameters: u and v normal with variance 1 / D, keys normal(0.02).

  No array of tokens times experts is ever made; the gradients of u and v are dense arrays like u and v.

  Raises:
    ValueError: a size or option out of its range.
  """

  flags = Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True)

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    *,
    heads: int = 8,
    k: int = 16,
    query_width: int = 128,
    query_norm: bool = True,
    keys_per_head: bool = False,
    score: str = 'softmax',
    activation: str = 'gelu',
    losses: Mapping[str, float] | None = None,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, num_experts=num_experts, heads=heads, k=k)
    side = math.isqrt(num_experts)
    if side * side != num_experts:
      raise ValueError(f'num_experts={num_experts}: accepted are squares')
    if k > side:
      raise ValueError(f'k={k} with num_experts={num_experts}: accepted are 1 to {side}')
    if query_width < 2 or query_width % 2:
      raise ValueError(f'query_width={query_width}: accepted are even integers from 2')
    if score not in SCORES:
      raise ValueError(f'score={score!r}: accepted are {", ".join(map(repr, SCORES))}')
    check_activation(activation)
    check_losses(dict(losses or {}))
    self.query = Linear(d_model, heads * query_width, rngs=rngs)
    self.query_norm = LayerNorm(query_width, dtype=wide_dtype(dtype)) if query_norm else None
    owners = (heads,) if keys_per_head else ()
    keys = nnx.initializers.normal(0.02)(
      rngs.params(), (2, *owners, side, query_width // 2), jnp.float32
    )
    self.keys = nnx.Param(keys)
    init = nnx.initializers.normal(d_model**-0.5)
    self.w_up = nnx.Param(init(rngs.params(), (num_experts, d_model), jnp.float32))
    self.w_down = nnx.Param(out_scale * init(rngs.params(), (num_experts, d_model), jnp.float32))
    self.side, self.heads, self.k, self.score = side, heads, k, score
    self.activation = activation
    self.losses = tuple(sorted((losses or {}).items()))
    self.dtype = jnp.dtype(dtype)

  def retrieve(
    self, x_bsd: Float[Array, 'B S D']
  ) -> tuple[Float[Array, 'B S N K'], Int[Array, 'B S N K']]:
    """Scores and numbers of the k best experts of every head, best first; float32 or wider."""
    wide = wide_dtype(x_bsd.dtype)
    weight = self.query.weight[...].astype(wide)
    query = product(x_bsd.astype(wide), weight, precision='highest').reshape(
      *x_bsd.shape[:2], self.heads, -1
    )
    if self.query_norm is not None:
      query = self.query_norm(query).astype(wide)
    halves = jnp.split(query, 2, -1)
    halves = [half.reshape(-1, *half.shape[2:]) for half in halves]
    found = retrieve(*halves, self.keys[...].astype(wide), self.k)
    score, expert = (part.reshape(*x_bsd.shape[:2], *part.shape[1:]) for part in found)
    return score, expert

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Outputs, zero for padding, and `Aux`.

    The statistics count experts by the first of their two keys, n entries of n experts each: a million experts
    would drown a log. Beside the usual metrics of these, `used` is the fraction of all experts that were chosen at
    least once in this call and `unevenness` the divergence of their use from the uniform one, in nats.
    """
    x_bsd, context = as_batch(x, context)
    real_bs = jnp.ones(x_bsd.shape[:2], bool) if context.mask is None else context.mask
    x_bsd = jnp.where(real_bs[..., None], x_bsd, 0)
    score_bsnk, expert_bsnk = self.retrieve(x_bsd)
    real = real_bs[..., None, None]
    weight_bsnk = jnp.where(real, SCORES[self.score](score_bsnk), 0)
    tokens = real_bs.size
    y_td = neurons(
      self.activation,
      x_bsd.reshape(tokens, -1).astype(self.dtype),
      expert_bsnk.reshape(tokens, -1),
      weight_bsnk.reshape(tokens, -1),
      self.w_up[...],
      self.w_down[...],
    )
    stats = retrieval_stats(score_bsnk, weight_bsnk, expert_bsnk // self.side, self.side, real_bs)
    metrics = routing_metrics(stats) | usage(expert_bsnk, real, self.side**2)
    aux = Aux(weighted_losses(stats, dict(self.losses)), metrics, stats)
    return y_td.astype(x.dtype).reshape(x.shape), aux

  def rows_per_token(self, sequence_length: int) -> float:
    """Experts that work on a token."""
    return float(self.heads * self.k)

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters that works on a token."""
    return min(1.0, self.heads * self.k / self.side**2)

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part; the sums of the k * k candidates are elementwise work."""
    d_model, width = self.query.weight.shape
    keys = 2 * self.side * width  # both halves of all heads' queries with n keys each
    experts = self.heads * self.k * 2 * 2 * d_model
    return {'router': 2 * d_model * width + keys, 'experts': experts}

  def expert(self, index: int):
    """One expert as a function `[..., D] -> [..., D]`: what the oracle loops over."""
    up_d, down_d = self.w_up[...][index], self.w_down[...][index]
    return functools.partial(_one_neuron, self.activation, up_d, down_d)


def _one_neuron(activation: str, up_d: Array, down_d: Array, x: Array) -> Array:
  return hidden(activation, (x @ up_d.astype(x.dtype),))[..., None] * down_d.astype(x.dtype)


def retrieval_stats(
  score_bsnk: Array, weight_bsnk: Array, bucket_bsnk: Array, num_buckets: int, real_bs: Array
) -> RoutingStats:
  """Routing sums by bucket of experts; probabilities are the softmax over the chosen, a mean over heads."""
  heads = score_bsnk.shape[2]
  real = real_bs[..., None, None]
  prob_bsnk = jnp.where(real, jax.nn.softmax(score_bsnk, -1), 0)
  partition_bsn = jnp.where(real[..., 0], jax.nn.logsumexp(score_bsnk, -1), 0)
  square_bsn = jnp.where(real[..., 0], (prob_bsnk**2).sum(-1), 1)
  dtype = score_bsnk.dtype
  sequence = jnp.arange(real_bs.shape[0], dtype=jnp.int32)[:, None, None, None]
  at = (jnp.broadcast_to(sequence, bucket_bsnk.shape), bucket_bsnk)
  zeros_be = jnp.zeros((real_bs.shape[0], num_buckets), dtype)
  chosen_be = zeros_be.at[at].add(jnp.broadcast_to(real, bucket_bsnk.shape).astype(dtype))
  prob_be = zeros_be.at[at].add(prob_bsnk / heads)
  weight_be = zeros_be.at[at].add(jax.lax.stop_gradient(weight_bsnk))
  share_be = chosen_be / jnp.maximum(chosen_be.sum(1, keepdims=True), 1)
  chosen_e = chosen_be.sum(0)
  return RoutingStats(
    tokens=real_bs.sum(dtype=dtype),
    chosen_e=chosen_e,
    kept_e=chosen_e,
    prob_e=prob_be.sum(0),
    weight_e=weight_be.sum(0),
    load_e=chosen_e,
    z=(partition_bsn**2).sum() / heads,
    entropy=entropy_terms(prob_bsnk).sum() / heads,
    sequence_balance=num_buckets * (share_be * prob_be).sum(),
    unrouted=jnp.zeros((), dtype),
    sparsity=(prob_bsnk.sum(-1) * jax.lax.rsqrt(square_bsn)).sum() / heads,
  )


def usage(expert_bsnk: Array, real: Array, num_experts: int) -> dict[str, Array]:
  """`used` and `unevenness` of all experts in one call."""
  rows = jnp.where(real, expert_bsnk, num_experts).reshape(-1)
  count_e = jnp.bincount(rows, length=num_experts + 1)[:-1].astype(jnp.float32)
  share_e = count_e / jnp.maximum(count_e.sum(), 1)
  return {
    'used': (count_e > 0).mean(dtype=jnp.float32),
    'unevenness': math.log(num_experts) - entropy_terms(share_e).sum(),
  }
