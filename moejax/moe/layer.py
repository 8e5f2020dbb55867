"""The mixture-of-experts layer: scores -> assignment -> dispatch -> exchange -> experts -> combine, losses beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Aux, Context, SoftPlan, wide_dtype
from moejax.moe.dispatch import Dispatch, fused
from moejax.moe.exchange import Exchange, single
from moejax.moe.experts import Experts
from moejax.moe.losses import check_losses, weighted_losses
from moejax.moe.metrics import routing_metrics
from moejax.moe.momentum import make_momentum
from moejax.moe.stats import routing_stats
from moejax.moe.widths import parts_of, rows_of_parts, with_core
from moejax.moe.zero_computation import ZeroExperts, rows_of_bank
from moejax.routers import Flags, Router, count_option, make_router
from moejax.routers.expert_choice import from_groups, to_groups
from moejax.routers.router import as_batch, as_given
from moejax.sizes import check_made_of
from moejax.transformer.flops import moe_flops_per_token
from moejax.transformer.linear import Linear, RMSNorm


class MoE(nnx.Module):
  """A mixture-of-experts layer.

  Args:
    d_model: D.
    d_ff: F, hidden width of an expert at granularity 1.
    num_experts: E at granularity 1.
    router: a short name, a mapping `{'name': ..., **options}`, or a `Router` of `granularity * num_experts` and the
      zero-computation experts.
    granularity: makes so many times more experts, so many times narrower, and multiplies the active experts of a
      router given by name (`k`, or `capacity_factor` of expert choice) likewise: expert parameters and work stay
      the same (Krajewski et al. 2024, "Scaling laws for fine-grained MoE"). Above 1, `k` and `capacity_factor`
      that are not given count as 1, so that k becomes the granularity. Slots of `soft` stay as they are.
    num_shared: so many experts of the same width work on every token with weight one (DeepSeekMoE, Dai et al.
      2024, section 3.2); they are fused into one. With one, the residual mixture of DeepSpeed-MoE (Rajbhandari et
      al. 2022, section 4.1.2).
    shared_mix: `c0 routed + c1 shared` with `[c0, c1] = softmax(x W + b)` learnt, as in DeepSpeed's code, instead of
      the sum.
    zero_experts: kind -> how many experts without computation the router chooses among too, after the others:
      'copy', 'constant' and 'zero' of moejax/moe/zero_computation.py (MoE++, Jin et al. 2024: 1, 2 and 1, k = 2 and
      weights 'softmax_topk').
    zero_cost: relative cost of an expert without computation in the loss 'cost_balance' (tau in MoE++, 0.75): below 1
      they take more tokens.
    widths: relative widths of the experts, one each, as (9, 11, 13, ...) in HMoE (Wang et al. 2024); their mean is
      d_ff. Rows cost what the width of their expert does, and the loss `cost_balance` is the paper's parameter penalty
      (divided by k). None: all alike.
    core: every expert is a common core plus its own residual (Residual MoE, Wu et al. 2022).
    core_noise: size of the initial residuals beside usual initial weights; 0: all experts start equal.
    forward_one: outputs have weight one, gradients that of the router: a layer whose experts are equal starts as the
      dense one (Residual MoE with k = 1). The experts run twice.
    activation, gated: see `Experts`.
    losses: name -> coefficient, names of `moejax.moe.losses.LOSSES`.
    dispatch: `fused`, `sorted_rows` or `einsum` of moejax/moe/dispatch.py.
    exchange: `single`, or one of moejax/moe/exchange.
    dtype: type of the experts' computation; router, softmax, losses and master weights are float32 always.
    output_norm: RMS normalisation of the output (a learnt scale).
    momentum: None, or a short name or `{'name': ..., **options}` of moejax/moe/momentum.py: the output remembers those
      of the mixtures below (MomentumSMoE).
    out_scale: see `Experts`.
    rngs: source of the initial parameters.

  Raises:
    ValueError: a size or option out of its range.
  """

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    router: str | Mapping[str, Any] | Router = 'top_k',
    *,
    granularity: int = 1,
    num_shared: int = 0,
    shared_mix: bool = False,
    zero_experts: Mapping[str, int] | None = None,
    zero_cost: float = 1.0,
    widths: Sequence[int] | None = None,
    core: bool = False,
    core_noise: float = 0.0,
    forward_one: bool = False,
    activation: str = 'silu',
    gated: bool = True,
    losses: Mapping[str, float] | None = None,
    dispatch: Dispatch = fused,
    exchange: Exchange = single,
    dtype=jnp.float32,
    output_norm: bool = False,
    momentum: str | Mapping[str, Any] | None = None,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    sizes = dict(d_model=d_model, d_ff=d_ff, num_experts=num_experts, granularity=granularity)
    check_made_of(rngs, **sizes)
    _check_sizes(d_ff, granularity, num_shared, shared_mix)
    _check_functions(dispatch, exchange)
    losses = {'balance': 0.01, 'z': 0.001} if losses is None else dict(losses)
    check_losses(losses)
    num_experts, d_ff = num_experts * granularity, d_ff // granularity
    self.num_experts, self.d_ff = num_experts, d_ff
    self.zero = ZeroExperts(d_model, zero_experts, dtype=dtype, rngs=rngs) if zero_experts else None
    num_all = num_experts + (0 if self.zero is None else self.zero.num_experts)
    self.router = _as_router(router, granularity, d_model=d_model, num_experts=num_all, rngs=rngs)
    if widths is not None and self.router.slots:
      raise ValueError('widths with a soft router: accepted are routers that choose experts')
    self.parts, unit = (None, d_ff) if widths is None else parts_of(widths, num_experts, d_ff)

    def make_bank(width: int, count: int) -> Experts:
      bank = {'activation': activation, 'gated': gated, 'dtype': dtype, 'out_scale': out_scale}
      return Experts(d_model, width, count, **bank, rngs=rngs)

    self.experts = make_bank(unit, sum(self.parts or (1,) * num_experts))
    self.core = make_bank(unit, 1) if core else None
    if core:
      own = nnx.split(self.experts)[1]
      nnx.update(self.experts, jax.tree.map(lambda w: core_noise * w, own))
    self.shared = make_bank(num_shared * d_ff, 1) if num_shared else None
    wide = wide_dtype(dtype)
    self.shared_mix = (
      Linear(d_model, 2, use_bias=True, dtype=wide, rngs=rngs) if shared_mix else None
    )
    self.forward_one, self.zero_cost = forward_one, zero_cost
    self.output_norm = RMSNorm(d_model, dtype=dtype) if output_norm else None
    self.momentum = None if momentum is None else make_momentum(momentum)
    self.losses = tuple(sorted(losses.items()))
    self.dispatch, self.exchange = dispatch, exchange

  def __call__(
    self, x: Float[Array, '*batch S D'], context: Context | None = None
  ) -> tuple[Float[Array, '*batch S D'], Aux]:
    """Routes `x` through the experts.

    Args:
      x: tokens, one or more sequences.
      context: what else the router may look at; its arrays have the leading shape of `x`.

    Returns:
      The weighted outputs, zero for padding, and `Aux`.
    """
    x = jnp.asarray(x)  # NumPy's have not what the dispatch needs
    x_bsd, context = as_batch(x, context)
    d_model = self.experts.w_up.shape[-2]
    if x.shape[-1] != d_model:
      raise ValueError(f'x of shape {x.shape}: expected [..., S, D={d_model}]')
    if context.mask is not None:
      x_bsd = jnp.where(
        context.mask[..., None], x_bsd, 0
      )  # whatever padding holds, it goes nowhere
    state = {**self.initial_state(x_bsd), **(context.state or {})}
    x_bsd = self.reads(x_bsd, state)
    scores, plan = self.router.route(x_bsd, context)
    state |= scores.state or {}
    if isinstance(plan, SoftPlan):
      y_bsd, lost = self._mix(x_bsd, plan), jnp.zeros((), scores.probs.dtype)
    else:
      y_bsd, plan, lost = self._send(x_bsd, plan, scores.probs.dtype)
      if self.router.feedback is not None:
        y_bsd, scores = self.router.feedback(y_bsd, scores, plan, context)
    if self.shared is not None:
      y_bsd = self._add_shared(x_bsd, y_bsd)
    if self.output_norm is not None:
      y_bsd = self.output_norm(y_bsd)
    if context.mask is not None:
      y_bsd = jnp.where(context.mask[..., None], y_bsd, 0)
    if self.momentum is not None:
      y_bsd, left = self.momentum(y_bsd.astype(wide_dtype(x.dtype)), state)
      state |= left
    stats = routing_stats(scores, plan, context, self._costs(scores.probs.shape[-1]))
    stats = dataclasses.replace(stats, lost=lost)
    losses = weighted_losses(stats, dict(self.losses))
    aux = Aux(losses, routing_metrics(stats), stats, as_given(state, x.shape) if state else None)
    return y_bsd.astype(x.dtype).reshape(x.shape), aux

  def initial_state(self, x_bsd: Float[Array, 'B S D']) -> dict[str, Array]:
    """What the first layer of a stack finds in `context.state`; empty of a layer without a state."""
    state = self.router.initial_state(x_bsd)
    if self.momentum is not None:
      state |= self.momentum.initial_state(x_bsd.shape, wide_dtype(x_bsd.dtype))
    return state

  def reads(self, x_bsd: Float[Array, 'B S D'], state: dict[str, Array]) -> Float[Array, 'B S D']:
    """What router and experts are applied to, given what the layers below left: x, or what momentum makes of it."""
    return x_bsd if self.momentum is None else self.momentum.reads(x_bsd, state)

  @property
  def flags(self) -> Flags:
    """What the router promises."""
    return self.router.flags

  def rows_per_token(self, sequence_length: int) -> float:
    """Mean number of rows that experts work on for a token, before any drop.

    Those of experts without computation are left out: the share that they have when all experts have as many tokens.
    """
    num_all = self.num_experts + (0 if self.zero is None else self.zero.num_experts)
    return self.router.rows_per_token(sequence_length) * self.num_experts / num_all

  def active_share(self, sequence_length: int) -> float:
    """Fraction of the experts' parameters that works on a token; of unlike experts when all have as many tokens."""
    return min(1.0, self.rows_per_token(sequence_length) / self.num_experts)

  def flops_per_token(self, sequence_length: int) -> dict[str, int | float]:
    """Model FLOPs of one token, by part."""
    d_model, gated = self.experts.w_up.shape[-2], self.experts.w_gate is not None
    num_shared = 0 if self.shared is None else self.shared.w_up.shape[-1] // self.d_ff
    return moe_flops_per_token(
      d_model=d_model,
      d_ff=self.d_ff,
      num_experts=self.router.num_experts,
      experts_per_token=self.rows_per_token(sequence_length),
      num_shared=num_shared,
      gated=gated,
    )

  def _send(
    self, x_bsd: Array, assignment: Assignment, dtype: jnp.dtype
  ) -> tuple[Array, Assignment, Array]:
    """Outputs, the rows that were worked on, and how many of those that should have been were not."""
    x_td = x_bsd.reshape(-1, x_bsd.shape[-1])
    rows = rows_of_bank(assignment, self.num_experts)
    y_td, lost_r = self._work(x_td, rows)
    if self.forward_one:
      ones_r = jnp.where(rows.expert < self.num_experts, jnp.ones_like(rows.weight), 0)
      whole_td, _ = self._work(x_td, dataclasses.replace(rows, weight=ones_r))
      y_td = y_td + jax.lax.stop_gradient(whole_td - y_td)
    if self.zero is not None:
      y_td = y_td + self.zero(x_td, assignment, self.num_experts)
    y_bsd = y_td.reshape(x_bsd.shape)
    if lost_r is None:
      return y_bsd, assignment, jnp.zeros((), dtype)
    worked = dataclasses.replace(
      assignment,
      expert=jnp.where(lost_r, assignment.num_experts, assignment.expert),
      weight=jnp.where(lost_r, 0, assignment.weight),
    )
    return y_bsd, worked, lost_r.sum(dtype=dtype)

  def _work(self, x_td: Array, rows: Assignment) -> tuple[Array, Array | None]:
    """Outputs of these rows, and which of them an exchange lost; a row of several parts with any of them."""
    if self.parts is None:
      return self.exchange(x_td, rows, self._bank(), self.dispatch)
    parts = rows_of_parts(rows, self.parts)
    y_td, lost_r = self.exchange(x_td, parts, self._bank(), self.dispatch)
    return y_td, None if lost_r is None else lost_r.reshape(rows.expert.size, -1).any(1)

  def _bank(self) -> Experts:
    return self.experts if self.core is None else with_core(self.experts, self.core)

  def _add_shared(self, x_bsd: Array, y_bsd: Array) -> Array:
    shared_bsd = self.shared.slots(x_bsd[:, None])[:, 0]
    if self.shared_mix is None:
      return y_bsd + shared_bsd
    share_bso = jax.nn.softmax(self.shared_mix(x_bsd, wide=True), -1).astype(y_bsd.dtype)
    return share_bso[..., :1] * y_bsd + share_bso[..., 1:] * shared_bsd

  def _costs(self, num_all: int) -> tuple[float, ...] | None:
    if self.zero is None and self.parts is None:
      return None
    mean = sum(self.parts or (1,)) / len(self.parts or (1,))
    costs = tuple(part / mean for part in self.parts or (1,) * self.num_experts)
    return costs + (self.zero_cost,) * (num_all - self.num_experts)

  def _mix(self, x_bsd: Array, plan: SoftPlan) -> Array:
    """Slots instead of rows: made where the tokens are, and only they travel."""
    rows_only = {'zero_experts': self.zero, 'widths': self.parts, 'forward_one': self.forward_one}
    for name, value in rows_only.items():
      if value:
        raise ValueError(f'{name} with a soft router: accepted are routers that choose experts')
    parts = [part.astype(self.experts.dtype) for part in (plan.dispatch, plan.combine, x_bsd)]
    if plan.across:  # B and S are then those of groups
      parts = [to_groups(part, 'position', plan.across) for part in parts]
    dispatch, combine, mixed_bsd = parts
    # the slots of all experts as one axis: with one slot an expert the last axis would have length 1
    into, out = (part.reshape(*part.shape[:2], -1) for part in (dispatch, combine))
    slots = jnp.matmul(into.swapaxes(1, 2), mixed_bsd)
    slots_bepd = slots.reshape(slots.shape[0], *dispatch.shape[2:], -1)
    y_bepd = self.exchange.slots(slots_bepd, self._bank())
    y_bsd = jnp.matmul(out, y_bepd.reshape(slots.shape))
    shape = (x_bsd.shape[0], x_bsd.shape[1])
    return from_groups(y_bsd, 'position', shape) if plan.across else y_bsd


def _check_sizes(d_ff: int, granularity: int, num_shared: int, shared_mix: bool) -> None:
  if num_shared < 0:
    raise ValueError(f'num_shared={num_shared}: accepted are integers from 0')
  if shared_mix and not num_shared:
    raise ValueError('shared_mix=True with num_shared=0: accepted are integers from 1')
  if d_ff % granularity:
    raise ValueError(f'granularity={granularity} does not divide d_ff={d_ff}')


def _check_functions(dispatch: Dispatch, exchange: Exchange) -> None:
  for key, function, place in (
    ('dispatch', dispatch, 'a function of moejax/moe/dispatch.py'),
    ('exchange', exchange, 'what moejax.moe.exchange.make_exchange returns'),
  ):
    if not callable(function):
      raise ValueError(f'{key}={function!r}: accepted is {place}')


def _as_router(
  router: str | Mapping[str, Any] | Router,
  granularity: int,
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
) -> Router:
  """The router that is given, or that is named, for all experts of a layer."""
  if not isinstance(router, Router):
    sizes: dict[str, Any] = {'d_model': d_model, 'num_experts': num_experts}
    router = _make_router(router, granularity, **sizes, rngs=rngs)
  if router.d_model not in (None, d_model):
    raise ValueError(f'router of d_model={router.d_model} in a layer of d_model={d_model}')
  if router.num_experts != num_experts:
    raise ValueError(f'router of {router.num_experts} experts in a layer of {num_experts}')
  return router


def _make_router(router: str | Mapping[str, Any], granularity: int, **sizes) -> Router:
  if not isinstance(router, str) and not (isinstance(router, Mapping) and 'name' in router):
    raise ValueError(
      f"router={router!r}: accepted are a short name, {{'name': ..., **options}} or a Router"
    )
  options: dict[str, Any] = {'name': router} if isinstance(router, str) else dict(router)
  name = options.pop('name')
  counts = count_option(name)
  if granularity > 1 and counts is not None:
    options[counts] = options.get(counts, 1) * granularity
  made = make_router(name, **sizes, **options)
  takes_all = made.slots or made.choices == made.num_experts
  if granularity > 1 and counts is None and not takes_all:
    raise ValueError(
      f'granularity={granularity} with router {name!r}: its k is fixed; accepted is top_k'
    )
  return made
