"""One router type for every method: a scorer module and two pure functions, affinity and assignment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Context, Scores, SoftPlan, wide_dtype


class RouterBias(nnx.Variable):
  """State of a router that no gradient moves: in the checkpoint, not in the optimizer."""


@dataclasses.dataclass(frozen=True)
class Flags:
  """What a router promises; the tests measure each promise, they trust none.

  Attributes:
    prefix_safe_train, prefix_safe_eval: outputs up to a position do not depend on later tokens.
    batch_free: outputs of a sequence do not depend on the other sequences of the batch.
    deterministic_eval: with `train=False`, no randomness.
    trains_router: the task loss has a gradient in the router's parameters.
    needs_ids: the router reads `context.token_ids`.
    stays_in_sequence: no row of an assignment leaves its sequence, so that a batch may be cut between
      sequences without an exchange.
  """

  prefix_safe_train: bool
  prefix_safe_eval: bool
  batch_free: bool
  deterministic_eval: bool = True
  trains_router: bool = True
  needs_ids: bool = False
  stays_in_sequence: bool = True

  @property
  def prefix_safe(self) -> bool:
    """Whether a causal language model may use the router at all."""
    return self.prefix_safe_train and self.prefix_safe_eval


Affinity = Callable[[Array, Array | None, Array | None, Context], Scores]
Assign = Callable[[Scores, Context], Assignment | SoftPlan]


class Router(nnx.Module):
  """scorer -> affinity -> assignment.

  Args:
    scorer: module, `(x [B, S, D], context) -> (logits [B, S, E, ...], noise std or None)`, float32 or wider.
    affinity: `(logits, std, bias, context) -> Scores`.
    assign: `(scores, context) -> Assignment | SoftPlan`.
    num_experts: E.
    flags: what the combination promises.
    bias: whether to keep a `RouterBias` `[E]` that a controller moves (moejax/moe/controllers.py).
    choices: mean number of experts that work on a token when nothing is dropped; None where that is not known, then
      it counts as all.
    slots: of soft methods, slots of all experts together.
  """

  def __init__(
    self,
    scorer: Callable,
    affinity: Affinity,
    assign: Assign,
    *,
    num_experts: int,
    flags: Flags,
    bias: bool = False,
    choices: int | float | None = None,
    slots: int = 0,
  ):
    self.scorer = scorer
    self.affinity = affinity
    self.assign = assign
    self.num_experts = num_experts
    self.flags = flags
    self.bias = RouterBias(jnp.zeros(num_experts, jnp.float32)) if bias else None
    self.choices = choices
    self.slots = slots

  def rows_per_token(self, sequence_length: int) -> float:
    """Mean number of rows (or slots) that experts work on for a token, before any drop."""
    if self.slots:
      return self.slots / sequence_length
    return float(self.num_experts if self.choices is None else self.choices)

  def scores(self, x_bsd: Float[Array, 'B S D'], context: Context) -> Scores:
    """Router logits and what follows from them, float32 or wider whatever the type of `x`."""
    logits, std = self.scorer(x_bsd.astype(wide_dtype(x_bsd.dtype)), context)
    bias = None if self.bias is None else jax.lax.stop_gradient(self.bias[...])
    return self.affinity(logits, std, bias, context)

  def route(self, x_bsd: Float[Array, 'B S D'], context: Context):
    """Scores and the assignment (or soft plan) made of them."""
    scores = self.scores(x_bsd, context)
    return scores, self.assign(scores, context)

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> Assignment | SoftPlan:
    """Routes `x`; `context` arrays have the leading shape of `x`. Token indices are row-major over it."""
    x_bsd, context = as_batch(x, context)
    return self.route(x_bsd, context)[1]


def as_batch(x: Array, context: Context | None) -> tuple[Array, Context]:
  """`[..., S, D]` -> `[B, S, D]`, and the arrays of the context from `[..., S]` to `[B, S]`."""
  if x.ndim < 2:
    raise ValueError(f'x of shape {x.shape}: expected [..., S, D]')
  *lead, num_positions, width = x.shape
  context = context or Context()

  def flat(name: str):
    value = getattr(context, name)
    if value is None:
      return None
    if value.shape != (*lead, num_positions):
      raise ValueError(f'context.{name} of shape {value.shape}: expected {(*lead, num_positions)}')
    return value.reshape(-1, num_positions)

  fields = {name: flat(name) for name in ('mask', 'token_ids', 'positions')}
  return x.reshape(-1, num_positions, width), dataclasses.replace(context, **fields)
