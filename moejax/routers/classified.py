"""What a router learns of the errors of the experts that it chose (Dryden & Hoefler 2022, "Spatial
mixture-of-experts", sections 3.2 and 3.3): routing classification loss and expert error damping."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Context, Scores


@dataclasses.dataclass(frozen=True)
class Classified:
  """`(y, scores, plan, context) -> (y, scores)`: y as it is, whose gradient says where the routing was wrong.

  A token's experts were wrong where the norm of its error signal `dL/dy` is above the quantile of all real tokens of
  the call. Labels, which sum to the number of chosen experts: 1 for a chosen expert, 0 where it was wrong; every expert
  that was not chosen has (wrong) / (not chosen). The binary cross-entropy of the logits with them, mean over experts,
  is the loss `guidance`. Its labels are known in the backward pass alone: its value is 0, its gradient that of the
  cross-entropy, and the coefficient of the loss counts as everywhere.

  Attributes:
    quantile: 0.7 in the paper's code, 0.3 in one of its scripts.
    damping: factor on the error signal of experts that were wrong; 0 in the paper, 1 for none.

  The paper's experts fill channels of their own, each with an error of its own; here the outputs of a token's experts
  are added, so that they are right or wrong together. Over accumulated steps the quantile is that of each microbatch.
  """

  quantile: float = 0.7
  damping: float = 0.0

  def __call__(
    self, y_bsd: Float[Array, 'B S D'], scores: Scores, plan: Assignment, context: Context
  ) -> tuple[Float[Array, 'B S D'], Scores]:
    shape = scores.logits.shape
    experts = jnp.arange(shape[-1], dtype=jnp.int32)
    chosen_re = (plan.chosen[:, None] == experts[None]).astype(scores.logits.dtype)
    chosen_te = jnp.zeros((shape[0] * shape[1], shape[2]), chosen_re.dtype)
    chosen_bse = chosen_te.at[plan.token].add(chosen_re).reshape(shape)
    real_bs = jnp.ones(shape[:2], bool) if context.mask is None else context.mask
    y_bsd, guidance_bs = _classified(self, y_bsd, scores.logits, chosen_bse, real_bs)
    return y_bsd, dataclasses.replace(scores, guidance=guidance_bs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _classified(rule: Classified, y_bsd, logits_bse, chosen_bse, real_bs):
  return y_bsd, jnp.zeros(real_bs.shape, logits_bse.dtype)


def _forward(rule, y_bsd, logits_bse, chosen_bse, real_bs):
  return _classified(rule, y_bsd, logits_bse, chosen_bse, real_bs), (
    logits_bse,
    chosen_bse,
    real_bs,
  )


def _backward(rule, saved, cotangents):
  logits_bse, chosen_bse, real_bs = saved
  dy_bsd, dguidance_bs = cotangents
  wrong_bs = wrong(dy_bsd, real_bs, rule.quantile)
  difference_bse = jax.nn.sigmoid(logits_bse) - labels(chosen_bse, wrong_bs)
  per_expert_bs = dguidance_bs / jnp.asarray(logits_bse.shape[-1], dguidance_bs.dtype)
  damping = jnp.asarray(rule.damping, dy_bsd.dtype)
  dy_bsd = jnp.where(wrong_bs[..., None], damping * dy_bsd, dy_bsd)
  return dy_bsd, per_expert_bs[..., None] * difference_bse, jnp.zeros_like(chosen_bse), None


_classified.defvjp(_forward, _backward)


def wrong(dy_bsd: Float[Array, 'B S D'], real_bs: Array, quantile: float) -> Array:
  """bool `[B, S]`: real tokens whose error is larger than the `quantile` of all real tokens' (the lower neighbour)."""
  wide = dy_bsd.astype(jnp.promote_types(dy_bsd.dtype, jnp.float32))
  size_bs = jnp.where(real_bs, jnp.sqrt((wide * wide).sum(-1)), jnp.inf)
  count = real_bs.sum(dtype=jnp.int32)
  rank = jnp.floor(quantile * jnp.maximum(count - 1, 0).astype(wide.dtype)).astype(jnp.int32)
  return real_bs & (size_bs > jnp.sort(size_bs.reshape(-1))[rank])


def labels(chosen_bse: Float[Array, 'B S E'], wrong_bs: Array) -> Float[Array, 'B S E']:
  """What the logits should have said; the labels of a token sum to the number of its experts."""
  count_bs1 = chosen_bse.sum(-1, keepdims=True)
  others_bs1 = jnp.maximum(chosen_bse.shape[-1] - count_bs1, 1)
  instead = jnp.where(chosen_bse > 0, 0, count_bs1 / others_bs1)
  return jnp.where(wrong_bs[..., None], instead, chosen_bse)
