"""One decision for a whole image (Daxberger et al. 2023, "Mobile V-MoEs: scaling down vision transformers via sparse
mixture-of-experts")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Router, with_flags
from moejax.routers.top_k import token_choice


class PooledScorer(nnx.Module):
  """`mean(x) W` over the real tokens of a sequence, for each of its tokens.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernel, variance 1 / D.
  """

  def __init__(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits, equal for all tokens of a sequence."""
    if context.mask is None:
      mean = x_bsd.mean(1)
    else:
      count = jnp.maximum(context.mask.sum(1, keepdims=True), 1).astype(x_bsd.dtype)
      mean = jnp.where(context.mask[..., None], x_bsd, 0).sum(1) / count
    logits = mean @ self.kernel[...].astype(x_bsd.dtype)
    return jnp.broadcast_to(logits[:, None], (*x_bsd.shape[:2], logits.shape[-1])), None


@dataclasses.dataclass(frozen=True)
class GuidedAffinity:
  """`TokenAffinity`, and the cross-entropy of its probabilities with the super-class, where `context.task` has one."""

  function: str
  k: int

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    scores = TokenAffinity(self.function, self.k)(logits_bse, std, bias_e, context)
    if context.task is None:
      return scores
    log_bse = jax.nn.log_softmax(logits_bse, -1)
    label_bs = jnp.broadcast_to(context.task[:, None], logits_bse.shape[:2])
    guidance_bs = -jnp.take_along_axis(log_bse, label_bs[..., None], -1)[..., 0]
    return dataclasses.replace(scores, guidance=guidance_bs)


def image(*, d_model: int, num_experts: int, rngs: nnx.Rngs, k: int = 1, **options) -> Router:
  """Top-k by the mean of an image's tokens: all of them go to the same experts.

  With super-class guidance `context.task` is the image's super-class, one of E, and the loss `guidance` (0.3 in the
  paper) the router's cross-entropy with it, instead of a balance loss; super-classes are clusters of what a dense model
  confuses. Without `context.task` that loss is zero. The paper has E = 10, k = 1, weight P, in the last two layers; how
  it pools is not published, here by the mean. Of text a sequence is what an image is, so that this is not prefix-safe.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernel.
    k: choices of an image.
    options: of `token_choice`.

  Raises:
    ValueError: as `token_choice`.
  """
  scorer = PooledScorer(d_model, num_experts, rngs=rngs)
  router = token_choice(scorer, num_experts=num_experts, k=k, affinity=GuidedAffinity, **options)
  return with_flags(router, prefix_safe_train=False, prefix_safe_eval=False)
