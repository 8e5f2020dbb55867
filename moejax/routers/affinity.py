"""Affinities: logits -> `Scores`. Selection score, weight material and loss probabilities stay apart."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores


@dataclasses.dataclass(frozen=True)
class TokenAffinity:
  """Softmax over experts, or a sigmoid of each, of the (noisy) logits.

  Attributes:
    function: 'softmax' or 'sigmoid'.
    k: number of choices, for the load probability.
  """

  function: str
  k: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    noisy_bse, load_bse = logits_bse, None
    if std is not None:
      noise = jax.random.normal(
        jax.random.fold_in(context.rng, 2), logits_bse.shape, logits_bse.dtype
      )
      noisy_bse = logits_bse + std * noise
      load_bse = load_probability(logits_bse, noisy_bse, std, self.k)
    gate_bse = _squash(self.function, noisy_bse)
    probs_bse = _squash(self.function, logits_bse)
    if self.function == 'sigmoid':
      probs_bse = probs_bse / jnp.maximum(probs_bse.sum(-1, keepdims=True), 1e-20)
    select_bse = (
      noisy_bse if bias_e is None else gate_bse + bias_e.astype(gate_bse.dtype)[None, None]
    )
    return Scores(logits_bse, select_bse, gate_bse, probs_bse, load_bse)


def _squash(function: str, logits_bse: Array) -> Array:
  return jax.nn.softmax(logits_bse, -1) if function == 'softmax' else jax.nn.sigmoid(logits_bse)


def load_probability(
  clean: Float[Array, '*batch E'], noisy: Float[Array, '*batch E'], std: Array, k: int
) -> Float[Array, '*batch E']:
  """Probability that an expert is in the top k if its own noise alone is drawn again.

  Shazeer et al. 2017, appendix A: the threshold is the k-th largest noisy logit among the *other* experts.
  The threshold carries no gradient. With `k >= E` every expert is always chosen: ones.
  """
  num_experts = clean.shape[-1]
  if k >= num_experts:
    return jnp.ones_like(clean)
  top, _ = jax.lax.top_k(noisy, k + 1)
  inside = noisy >= top[..., k - 1 : k]
  threshold = jax.lax.stop_gradient(jnp.where(inside, top[..., k:], top[..., k - 1 : k]))
  return norm.cdf((clean - threshold) / std)
