"""Soft MoE: slots are convex combinations of all tokens, outputs of all slots (Puigcerver et al. 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores, SoftPlan
from moejax.routers.router import Flags, Router


class SlotScorer(nnx.Module):
  """`logits = scale * normalise(x) . normalise(phi)`, one logit a slot (section 2.3 of the paper).

  Args:
    d_model: D.
    num_experts: E.
    slots: P, slots of an expert.
    rngs: source of the initial phi, LeCun normal over D.

  The learnt scale, 1 at the start, multiplies phi.
  """

  def __init__(self, d_model: int, num_experts: int, slots: int, *, rngs: nnx.Rngs):
    shape = (d_model, num_experts, slots)
    phi = d_model**-0.5 * jax.random.normal(rngs.params(), shape, jnp.float32)
    self.phi = nnx.Param(phi)
    self.scale = nnx.Param(jnp.ones((), jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E P'], None]:
    """Logits in [-scale, scale]."""
    x_bsd = normalise(x_bsd, -1)
    phi_dep = self.scale[...].astype(x_bsd.dtype) * normalise(self.phi[...].astype(x_bsd.dtype), 0)
    return jnp.einsum('BSD,DEP->BSEP', x_bsd, phi_dep), None


def normalise(x: Array, axis: int) -> Array:
  """Unit length along an axis; 1e-6 is added to the squared length as in the released code."""
  return x * jax.lax.rsqrt((x * x).sum(axis, keepdims=True) + jnp.asarray(1e-6, x.dtype))


def slot_affinity(
  logits_bsep: Array, std: Array | None, bias: Array | None, context: Context
) -> Scores:
  """Per-expert view of the slot logits: an expert's probability is the combine weight of all its slots."""
  logits_bse = jax.nn.logsumexp(logits_bsep, -1)
  return Scores(logits_bse, logits_bsep, logits_bsep, jax.nn.softmax(logits_bse, -1))


def mix(scores: Scores, context: Context) -> SoftPlan:
  """Dispatch: softmax over the tokens of a sequence. Combine: softmax over all slots.

  Padding enters no slot. Its combine weights are zero.
  """
  logits_bsep = scores.select
  mask = None if context.mask is None else context.mask[..., None, None]
  dispatch = jax.nn.softmax(logits_bsep, 1, where=mask)
  combine = jax.nn.softmax(logits_bsep, (-2, -1))
  if mask is not None:
    combine = jnp.where(mask, combine, 0)
  return SoftPlan(dispatch, combine)


def soft(*, d_model: int, num_experts: int, rngs: nnx.Rngs, slots: int = 1) -> Router:
  """Soft MoE.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial slot parameters.
    slots: P, slots of an expert; E * P close to the number of tokens costs what a dense layer costs.

  Raises:
    ValueError: slots below 1.
  """
  if slots < 1:
    raise ValueError(f'slots={slots}: accepted are integers from 1')
  return Router(
    SlotScorer(d_model, num_experts, slots, rngs=rngs),
    slot_affinity,
    mix,
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=False, prefix_safe_eval=False, batch_free=True),
  )
