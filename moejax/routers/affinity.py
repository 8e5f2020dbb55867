"""Affinities: logits -> `Scores`. Selection score, weight material and loss probabilities stay apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores
from moejax.routers.weighting import LEAST


@dataclasses.dataclass(frozen=True)
class TokenAffinity:
  """Softmax over experts, or a sigmoid of each, of the (noisy) logits.

  Attributes:
    function: 'softmax' or 'sigmoid'.
    k: number of choices, for the load probability.
    one_threshold: of the load probability, see `load_probability`.
  """

  function: str
  k: int
  one_threshold: bool = False

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    noisy_bse, load_bse = logits_bse, None
    if std is not None:
      noise = jax.random.normal(
        jax.random.fold_in(context.rng, 2), logits_bse.shape, logits_bse.dtype
      )
      noisy_bse = logits_bse + std * noise
      load_bse = load_probability(logits_bse, noisy_bse, std, self.k, self.one_threshold)
    probs_bse, partition_bs = _squash(self.function, logits_bse)
    gate_bse = probs_bse if std is None else _squash(self.function, noisy_bse)[0]
    if self.function == 'sigmoid':
      probs_bse = probs_bse / jnp.maximum(probs_bse.sum(-1, keepdims=True), LEAST)
    select_bse = (
      noisy_bse if bias_e is None else gate_bse + bias_e.astype(gate_bse.dtype)[None, None]
    )
    return Scores(logits_bse, select_bse, gate_bse, probs_bse, load_bse, partition=partition_bs)


def _squash(function: str, logits_bse: Array) -> tuple[Array, Array | None]:
  return softmax(logits_bse) if function == 'softmax' else (jax.nn.sigmoid(logits_bse), None)


@jax.custom_vjp
def softmax(
  logits: Float[Array, '*batch E'],
) -> tuple[Float[Array, '*batch E'], Float[Array, ' *batch']]:
  """Softmax over the last axis and its log-partition function: one exponential an entry, none for the gradient.

  The gradient of an entry is `p_e (dp_e - sum_j p_j dp_j + dz)`, made of the probabilities alone.
  """
  largest = logits.max(-1, keepdims=True)
  parts = jnp.exp(logits - largest)
  total = parts.sum(-1, keepdims=True)
  return parts / total, (largest + jnp.log(total))[..., 0]


def _softmax_forward(logits: Array):
  probs, partition = softmax(logits)
  return (probs, partition), probs


def _softmax_backward(probs: Array, cotangents: tuple[Array, Array]) -> tuple[Array]:
  dprobs, dpartition = cotangents
  same = dpartition - (probs * dprobs).sum(-1)
  return (probs * (dprobs + same[..., None]),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def load_probability(
  clean: Float[Array, '*batch E'],
  noisy: Float[Array, '*batch E'],
  std: Array,
  k: int,
  one_threshold: bool = False,
) -> Float[Array, '*batch E']:
  """Probability that an expert is in the top k if its own noise alone is drawn again.

  Shazeer et al. 2017, appendix A: the threshold is the k-th largest noisy logit among the *other* experts. With
  `one_threshold` it is the k-th largest of all, for every expert, as in V-MoE (Riquelme et al. 2021, released code).
  The threshold carries no gradient. With `k >= E` every expert is always chosen: ones.
  """
  num_experts = clean.shape[-1]
  if k >= num_experts:
    return jnp.ones_like(clean)
  top, _ = jax.lax.top_k(noisy, k + 1)
  last, next_best = top[..., k - 1 : k], top[..., k:]
  threshold = last if one_threshold else jnp.where(noisy >= last, next_best, last)
  return norm.cdf((clean - jax.lax.stop_gradient(threshold)) / std)
