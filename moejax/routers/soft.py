"""Soft MoE: slots are convex combinations of all tokens, outputs of all slots (Puigcerver et al. 2023)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores, SoftPlan
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import check_from_one

MIXINGS = ('learned', 'learned_dispatch', 'learned_combine', 'uniform', 'identity')


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


@dataclasses.dataclass(frozen=True)
class EqualSlots:
  """The scorer of mixings without parameters: all logits zero.

  Attributes:
    num_experts: E.
    slots: P.
  """

  num_experts: int
  slots: int

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E P'], None]:
    return jnp.zeros((*x_bsd.shape[:2], self.num_experts, self.slots), x_bsd.dtype), None


def normalise(x: Array, axis: int) -> Array:
  """Unit length along an axis; 1e-6 is added to the squared length as in the released code."""
  return x * jax.lax.rsqrt((x * x).sum(axis, keepdims=True) + jnp.asarray(1e-6, x.dtype))


def slot_affinity(
  logits_bsep: Array, std: Array | None, bias: Array | None, context: Context
) -> Scores:
  """Per-expert view of the slot logits: an expert's probability is the combine weight of all its slots."""
  one = logits_bsep.shape[-1] == 1
  logits_bse = logits_bsep[..., 0] if one else jax.nn.logsumexp(logits_bsep, -1)
  return Scores(logits_bse, logits_bsep, logits_bsep, jax.nn.softmax(logits_bse, -1))


@dataclasses.dataclass(frozen=True)
class Mix:
  """`Scores -> SoftPlan`. Dispatch: softmax over the tokens of a sequence. Combine: softmax over all slots.

  Padding enters no slot. Its combine weights are zero.

  Attributes:
    mixing: see `soft`.
  """

  mixing: str = 'learned'

  def __call__(self, scores: Scores, context: Context) -> SoftPlan:
    shape = scores.select.shape
    # the slots of all experts as one axis: a softmax over [E, 1] is far slower on CPUs than one over [1, E]
    logits = scores.select.reshape(*shape[:2], -1)  # [B, S, E P]
    mask = None if context.mask is None else context.mask[..., None]
    if self.mixing == 'identity':
      dispatch = combine = self._identity(scores.select).reshape(logits.shape)
      if mask is not None:
        dispatch = jnp.where(mask, dispatch, 0)
    else:
      uniform = jnp.zeros_like(logits)
      into = logits if self.mixing in ('learned', 'learned_dispatch') else uniform
      out = logits if self.mixing in ('learned', 'learned_combine') else uniform
      dispatch = jax.nn.softmax(into, 1, where=mask)
      combine = jax.nn.softmax(out, -1)
    if mask is not None:
      combine = jnp.where(mask, combine, 0)
    return SoftPlan(dispatch.reshape(shape), combine.reshape(shape))

  def _identity(self, logits_bsep: Array) -> Array:
    """Token i fills slot i alone, counted expert by expert, and takes its output."""
    _, num_positions, num_experts, slots = logits_bsep.shape
    if num_experts * slots != num_positions:
      raise ValueError(
        f"mixing='identity' with num_experts={num_experts} of slots={slots} on {num_positions} tokens a sequence: "
        f'accepted is num_experts * slots = {num_positions}'
      )
    eye = jnp.eye(num_positions, dtype=logits_bsep.dtype)
    return jnp.broadcast_to(eye.reshape(1, *logits_bsep.shape[1:]), logits_bsep.shape)


def soft(
  *, d_model: int, num_experts: int, rngs: nnx.Rngs, slots: int = 1, mixing: str = 'learned'
) -> Router:
  """Soft MoE.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial slot parameters.
    slots: P, slots of an expert; E * P close to the number of tokens costs what a dense layer costs.
    mixing: what is learnt, as in the ablation of the paper's table 2. 'learned': dispatch and combine.
      'learned_dispatch', 'learned_combine': the other one is uniform. 'uniform': slots are the mean of the tokens,
      outputs the mean of the slots. 'identity': token i goes through slot i alone; needs E * P tokens a sequence. The
      last two have no parameters.

  Raises:
    ValueError: slots below 1 or an unknown mixing; when called with mixing='identity', another number of tokens.
  """
  check_from_one(slots=slots)
  if mixing not in MIXINGS:
    raise ValueError(f'mixing={mixing!r}: accepted are {", ".join(map(repr, MIXINGS))}')
  learns, safe = mixing.startswith('learned'), mixing == 'identity'
  return Router(
    SlotScorer(d_model, num_experts, slots, rngs=rngs)
    if learns
    else EqualSlots(num_experts, slots),
    slot_affinity,
    Mix(mixing),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=safe,
      prefix_safe_eval=safe,
      batch_free=True,
      trains_router=learns,
      needs_past=safe,  # the slot is the token's place
    ),
    slots=num_experts * slots,
  )
