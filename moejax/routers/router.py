"""One router type for every method: a scorer module and two pure functions, affinity and assignment."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from moejax.arrays import Assignment, Context, Scores, SoftPlan, full_precision, wide_dtype


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
    needs: fields of the context that the router cannot do without, such as 'token_ids'.
    needs_past: the router reads what stands before a token in its sequence, or counts it: decoding one token at a time,
      it needs that again. Without it, prefix-safe and batch-free, one token at a time is one pass.
    has_state: the router leaves something for the layer above and reads what the layer below left.
    stays_in_sequence: no row of an assignment leaves its sequence, so that a batch may be cut between
      sequences without an exchange.
  """

  prefix_safe_train: bool
  prefix_safe_eval: bool
  batch_free: bool
  deterministic_eval: bool = True
  trains_router: bool = True
  needs: tuple[str, ...] = ()
  needs_past: bool = False
  has_state: bool = False
  stays_in_sequence: bool = True

  @property
  def prefix_safe(self) -> bool:
    """Whether a causal language model may use the router at all."""
    return self.prefix_safe_train and self.prefix_safe_eval

  @property
  def one_by_one(self) -> bool:
    """Whether tokens that are decoded one at a time are routed as in one pass."""
    safe = self.prefix_safe_eval and self.batch_free and self.deterministic_eval
    return safe and not self.needs_past


Affinity = Callable[[Array, Array | None, Array | None, Context], Scores]
Assign = Callable[[Scores, Context], Assignment | SoftPlan]
Feedback = Callable[[Array, Scores, Assignment, Context], tuple[Array, Scores]]


class Router(nnx.Module):
  """scorer -> affinity -> assignment.

  Its matrix products are of float32 in full on every platform; not so those of routers with `slots`, which choose
  nothing, and whose logits are much more work.

  Args:
    scorer: module, `(x [B, S, D], context) -> (logits [B, S, E, ...], noise std or None)`, float32 or wider. With the
      flag `has_state` it returns its state as a third, and has `initial_state((B, S), dtype)`, what it reads in
      `context.state` at the first layer.
    affinity: `(logits, std, bias, context) -> Scores`.
    assign: `(scores, context) -> Assignment | SoftPlan`.
    num_experts: E.
    flags: what the combination promises.
    bias: whether to keep a `RouterBias` `[E]` that a controller moves (moejax/moe/controllers.py).
    choices: mean number of experts that work on a token when nothing is dropped; None where that is not known, then
      it counts as all.
    slots: of soft methods, slots of all experts together.
    feedback: `(y [B, S, D], scores, assignment, context) -> (y, scores)`, what the layer passes its experts' output
      through, so that the router may learn from the gradient there (moejax/routers/classified.py); None for nothing.

  Attributes:
    d_model: D of a router that `make_router` made; None where it is not known.
  """

  d_model: int | None = None

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
    feedback: Feedback | None = None,
  ):
    self.scorer: Any = scorer
    self.affinity = affinity
    self.assign = assign
    self.num_experts = num_experts
    self.flags = flags
    self.bias = RouterBias(jnp.zeros(num_experts, jnp.float32)) if bias else None
    self.choices = choices
    self.slots = slots
    self.feedback = feedback

  def rows_per_token(self, sequence_length: int) -> float:
    """Mean number of rows (or slots) that experts work on for a token, before any drop."""
    if self.slots:
      return self.slots / sequence_length
    return float(self.num_experts if self.choices is None else self.choices)

  def scores(self, x_bsd: Float[Array, 'B S D'], context: Context) -> Scores:
    """Router logits and what follows from them, float32 or wider whatever the type of `x`."""
    x_bsd = x_bsd.astype(wide_dtype(x_bsd.dtype))
    bias = None if self.bias is None else jax.lax.stop_gradient(self.bias[...])
    with contextlib.nullcontext() if self.slots else full_precision():
      if not self.flags.has_state:
        logits, std = self.scorer(x_bsd, context)
        return self.affinity(logits, std, bias, context)
      before = {**self.initial_state(x_bsd), **(context.state or {})}
      context = dataclasses.replace(context, state=before)
      logits, std, state = self.scorer(x_bsd, context)
      return dataclasses.replace(self.affinity(logits, std, bias, context), state=state)

  def initial_state(self, x_bsd: Float[Array, 'B S D']) -> dict[str, Array]:
    """What the first layer finds in `context.state`; empty of a router without a state."""
    if not self.flags.has_state:
      return {}
    return self.scorer.initial_state(x_bsd.shape[:2], wide_dtype(x_bsd.dtype))

  def route(self, x_bsd: Float[Array, 'B S D'], context: Context):
    """Scores and the assignment (or soft plan) made of them."""
    scores = self.scores(x_bsd, context)
    with full_precision():
      return scores, self.assign(scores, context)

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> Assignment | SoftPlan:
    """Routes `x`; `context` arrays have the leading shape of `x`. Token indices are row-major over it."""
    x_bsd, context = as_batch(x, context)
    return self.route(x_bsd, context)[1]


_KINDS = {
  'mask': jnp.bool_,
  'token_ids': jnp.integer,
  'positions': jnp.integer,
  'previous_ids': jnp.integer,
  'task': jnp.integer,
}
_KIND_NAMES = {jnp.bool_: 'bool', jnp.integer: 'an integer type'}


def _check_mesh(x: Array) -> None:
  """Raises ValueError for x that is cut over an axis of explicit sharding: reshapes would have to name it."""
  sharding = jax.typeof(x).sharding
  kinds = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
  used = [
    axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))
  ]
  explicit = [axis for axis in used if kinds.get(axis) == AxisType.Explicit]
  if explicit:
    raise ValueError(
      f'x is cut over mesh axis {explicit[0]!r} of explicit sharding: accepted are axes of type AxisType.Auto, as '
      'moejax.mesh.make.make_mesh makes them'
    )


def as_batch(x: Array, context: Context | None) -> tuple[Array, Context]:
  """`[..., S, D]` -> `[B, S, D]`, and the arrays of the context from `[..., S]` to `[B, S]`.

  Raises:
    ValueError: x that has no position axis, is of integers or is cut over an axis of explicit sharding; a context that
      is none; an array of the context whose leading shape is not that of x, or of another type than it names.
  """
  if x.ndim < 2:
    raise ValueError(f'x of shape {x.shape}: expected [..., S, D]')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x of dtype {x.dtype}: accepted are floating-point types')
  _check_mesh(x)
  *lead, num_positions, width = x.shape
  context = Context() if context is None else context
  if not isinstance(context, Context):
    raise ValueError(
      f'context is a {type(context).__name__}: accepted is a moejax.Context, such as Context(mask=...)'
    )

  def flat(name: str, over: int, rank: int | None = None):
    """Joins the axes of the batch; `over` is 1 where positions follow them, `rank` how many axes follow these."""
    value = getattr(context, name)
    if value is None:
      return None
    expected = (*lead, num_positions)[: len(lead) + over]
    if value.shape[: len(expected)] != expected or rank not in (None, value.ndim - len(expected)):
      raise ValueError(f'context.{name} of shape {value.shape}: expected {expected}')
    kind = _KINDS.get(name)
    if kind is not None and not jnp.issubdtype(value.dtype, kind):
      raise ValueError(f'context.{name} of dtype {value.dtype}: accepted is {_KIND_NAMES[kind]}')
    return value.reshape(-1, *value.shape[len(lead) :])

  fields = {name: flat(name, 1, 0) for name in ('mask', 'token_ids', 'positions', 'previous_ids')}
  fields |= {name: flat(name, 0, 0) for name in ('task', 'time')}
  fields |= {name: flat(name, 0) for name in ('domain', 'text', 'maps')}
  if context.state is not None:
    fields['state'] = {
      name: value.reshape(-1, *value.shape[len(lead) :]) if value.ndim else value
      for name, value in context.state.items()
    }
  return x.reshape(-1, num_positions, width), dataclasses.replace(context, **fields)


def as_given(state: dict[str, Array], shape: tuple[int, ...]) -> dict[str, Array]:
  """The state `[B, S, ...]` of a call with the leading axes of its x, which has this shape."""
  return {
    name: value.reshape(*shape[:-2], *value.shape[1:]) if value.ndim else value
    for name, value in state.items()
  }


def with_flags(router: Router, **flags) -> Router:
  """The router with some of its flags declared anew."""
  router.flags = dataclasses.replace(router.flags, **flags)
  return router


def previous_ids(context: Context) -> Int[Array, '*batch S'] | None:
  """The id before each token in its document, -1 where there is none; None without `context.token_ids`."""
  ids = context.token_ids
  if context.previous_ids is not None or ids is None:
    return context.previous_ids
  before = jnp.pad(ids[..., :-1], [(0, 0)] * (ids.ndim - 1) + [(1, 0)], constant_values=-1)
  return before if context.positions is None else jnp.where(context.positions > 0, before, -1)


def required(context: Context, field: str, name: str) -> Array:
  """The field of the context that a router of this name cannot do without.

  Raises:
    ValueError: it is None.
  """
  value = getattr(context, field)
  if value is None:
    raise ValueError(f'{name} needs {field.replace("_", " ")}: pass context.{field}')
  return value
