"""Token choice: every token takes its k best experts.

`token_choice` makes a router of any scorer and affinity; `top_k` is the one with linear logits.

Shazeer et al. 2017; GShard, Lepikhin et al. 2020; Switch, Fedus et al. 2021; V-MoE, Riquelme et al. 2021;
DeepSeekMoE, Dai et al. 2024; Mixtral, Jiang et al. 2024; loss-free balancing, Wang et al. 2024. They differ in
options of this one function: weights, capacity and its priority, noise, bias.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.affinity import TokenAffinity
from moejax.routers.capacity import PRIORITIES, capacities, capacity, keep_within_capacity_by_group
from moejax.routers.router import Affinity, Flags, Router
from moejax.routers.scorers import LinearScorer, context_key
from moejax.routers.weighting import WEIGHTINGS, Weights, normalised

SECOND_POLICIES = ('all', 'none', 'threshold', 'random')


@dataclasses.dataclass(frozen=True)
class Capacity:
  """A bounded buffer an expert.

  Attributes:
    train_factor, eval_factor: C = ceil(factor * k * tokens / experts).
    priority: see `moejax.routers.capacity.keep_within_capacity`.
    group: 'batch' (one buffer for all tokens of the call) or 'sequence' (one for each).
    renorm_after_drop: renormalise the weights of the surviving choices of a token to sum to one.
    shares: relative capacity of every expert; None: all alike.
  """

  train_factor: float
  eval_factor: float
  priority: str = 'token_major'
  group: str = 'batch'
  renorm_after_drop: bool = False
  shares: tuple[float, ...] | None = None

  def prefix_safe(self, k: int, train: bool) -> bool:
    """'random' order holds in training only; with one choice the two position orders are the same."""
    priority = 'choice_major' if self.priority == 'random' and not train else self.priority
    return priority == 'token_major' or (priority == 'choice_major' and k == 1)


@dataclasses.dataclass(frozen=True)
class TopKAssign:
  """`Scores -> Assignment` in token-major rows: row `t * k + j` is the j-th choice of token t.

  An expert whose selection score is -inf is never chosen.

  Attributes:
    k: choices of a token.
    weights: of the chosen gates.
    scale: factor on all weights.
    capacity: None for dropless.
    second_policy, second_threshold: see `token_choice`.
    active: `context -> int32 scalar`, how many of the k choices are in use; None for all.
  """

  k: int
  weights: Weights
  scale: float = 1.0
  capacity: Capacity | None = None
  second_policy: str = 'all'
  second_threshold: float = 0.2
  active: Callable[[Context], Array] | None = None

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    num_sequences, num_positions, num_experts = scores.select.shape
    num_tokens = num_sequences * num_positions
    select_bsk, expert_bsk = best(scores.select, self.k)
    gate_bsk = jnp.take_along_axis(scores.gate, expert_bsk, -1)
    wanted_bsk = select_bsk > -jnp.inf
    if self.active is not None:
      active_k = jnp.arange(self.k, dtype=jnp.int32) < self.active(context)
      wanted_bsk &= active_k[None, None]
      gate_bsk = jnp.where(active_k[None, None], gate_bsk, 0)
    weight_bsk = self.weights(gate_bsk) * jnp.asarray(self.scale, gate_bsk.dtype)
    wanted_bsk &= self._wanted(weight_bsk, context)
    expert_bsk = jnp.where(wanted_bsk, expert_bsk, num_experts).astype(jnp.int32)
    kept_bsk = self._kept(expert_bsk, gate_bsk, num_experts, context)
    weight_bsk = jnp.where(kept_bsk, weight_bsk, 0)
    if self.capacity is not None and self.capacity.renorm_after_drop:
      weight_bsk = self._renormalise(weight_bsk)
    return Assignment(
      token=jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), self.k),
      expert=jnp.where(kept_bsk, expert_bsk, num_experts).reshape(-1),
      weight=weight_bsk.reshape(-1),
      chosen=expert_bsk.reshape(-1),
      num_experts=num_experts,
      groups=num_tokens,
    )

  def _wanted(self, weight_bsk: Array, context: Context) -> Array:
    """All but padding, and but the second choices that the GShard policies give up."""
    wanted_bsk = jnp.ones(weight_bsk.shape, bool)
    if context.mask is not None:
      wanted_bsk &= context.mask[..., None]
    if self.second_policy == 'all':
      return wanted_bsk
    second_bs = weight_bsk[..., 1]
    limit = jnp.asarray(self.second_threshold, second_bs.dtype)
    if self.second_policy == 'none':
      keep_bs = jnp.zeros(second_bs.shape, bool)
    elif self.second_policy == 'threshold' or not context.train:
      keep_bs = second_bs > limit
    else:
      key = context_key(context, 3, "second_policy='random'")
      keep_bs = jax.random.uniform(key, second_bs.shape, second_bs.dtype) < second_bs / limit
    return wanted_bsk.at[..., 1].set(wanted_bsk[..., 1] & keep_bs)

  def _kept(self, expert_bsk: Array, gate_bsk: Array, num_experts: int, context: Context) -> Array:
    kept_bsk = expert_bsk < num_experts
    if self.capacity is None:
      return kept_bsk
    rule = self.capacity
    group_shape = expert_bsk.shape[:2] if rule.group == 'sequence' else (1, -1)
    expert_gtk = expert_bsk.reshape(*group_shape, self.k)
    order_gt, priority = None, rule.priority
    if priority == 'score':
      order_gt = gate_bsk[..., 0]
    elif priority == 'random' and context.train:
      order_gt = jax.random.uniform(
        context_key(context, 4, "priority='random'"), expert_bsk.shape[:2]
      )
    elif priority == 'random':
      priority = 'choice_major'
    if order_gt is not None:
      order_gt = jax.lax.stop_gradient(order_gt).reshape(*group_shape)
    factor = rule.train_factor if context.train else rule.eval_factor
    limit: int | Array = capacity(expert_gtk.shape[1], num_experts, self.k, factor)
    if rule.shares is not None:
      limit = capacities(expert_gtk.shape[1], rule.shares, self.k, factor)
    keep_gtk = keep_within_capacity_by_group(expert_gtk, num_experts, limit, priority, order_gt)
    return kept_bsk & keep_gtk.reshape(expert_bsk.shape)

  def _renormalise(self, weight_bsk: Array) -> Array:
    return normalised(weight_bsk) * jnp.asarray(self.scale, weight_bsk.dtype)


def best(
  score: Float[Array, '*batch E'], k: int
) -> tuple[Float[Array, '*batch K'], Int[Array, '*batch K']]:
  """The k largest and their places, as `jax.lax.top_k`: ties in the order of their places.

  One place is found among blocks of 32 and then within the best of them, which is faster on a CPU.
  """
  if k > 1:
    value, place = jax.lax.top_k(score, k)
    return value, place
  num_experts = score.shape[-1]
  block = math.gcd(num_experts, 32)
  blocks = score.reshape(*score.shape[:-1], num_experts // block, block)
  first = jnp.argmax(blocks.max(-1), -1, keepdims=True)
  within = jnp.take_along_axis(blocks, first[..., None], -2)[..., 0, :]
  place = (first * block + jnp.argmax(within, -1, keepdims=True)).astype(jnp.int32)
  return jnp.take_along_axis(score, place, -1), place


def token_choice(
  scorer: Callable,
  *,
  num_experts: int,
  k: int,
  affinity: Callable[[str, int], Affinity] = TokenAffinity,
  weighting: str | None = None,
  route_scale: float = 1.0,
  capacity_factor: float | None = None,
  eval_capacity_factor: float | None = None,
  priority: str = 'token_major',
  capacity_group: str = 'batch',
  renorm_after_drop: bool = False,
  capacity_shares: Sequence[int | float] | None = None,
  second_policy: str = 'all',
  second_threshold: float = 0.2,
  balance_bias: bool = False,
) -> Router:
  """Top-k token choice by the logits of a scorer.

  Args:
    scorer: `(x, context) -> (logits, noise std or None)`.
    num_experts: E.
    k: choices of a token.
    affinity: `(function, k) -> Affinity`, the function 'softmax' or 'sigmoid' of the weighting.
    weighting: a name of `moejax.routers.weighting.WEIGHTINGS`; default 'softmax_topk' for k = 1, else
      'softmax_topk_norm'.
    route_scale: factor on all weights (2.5 in DeepSeek-V3).
    capacity_factor: None for dropless, else C = ceil(factor * k * tokens / experts).
    eval_capacity_factor: capacity factor outside training, of routers that have one in training; default
      `capacity_factor`.
    priority: 'token_major', 'choice_major', 'score' (batch-prioritised routing) or 'random'.
    capacity_group: 'batch' or 'sequence', the tokens that share a buffer.
    renorm_after_drop: renormalise the weights of what survives (DeepSpeed; GShard does not); of two choices or more.
    capacity_shares: relative capacities, one an expert: C_e = ceil(factor * k * tokens * share_e / sum of shares). In
      MoE++ tau = 0.75 for feed-forward experts and 1 for those without computation, with a factor of 1.1.
    second_policy: what becomes of second choices, 'all', 'none', 'threshold' (kept above
      `second_threshold`) or 'random' (kept with probability weight / `second_threshold` in training, as
      'threshold' outside of it): GShard.
    second_threshold: see `second_policy`.
    balance_bias: keep a bias that moves the selection, not the weights, for the loss-free controller.

  Raises:
    ValueError: an option out of its range, options of a capacity without `capacity_factor`, or k = 1 with weights
      that are normalised over the chosen (they are constant, so that the router would never learn).
  """
  weighting = weighting or ('softmax_topk' if k == 1 else 'softmax_topk_norm')
  _check(num_experts, k, weighting, capacity_factor, eval_capacity_factor)
  check_name('second_policy', second_policy, SECOND_POLICIES)
  if second_policy != 'all' and k != 2:
    raise ValueError(f'second_policy={second_policy!r} with k={k}: accepted with k=2 only')
  function, weights = WEIGHTINGS[weighting]
  limit = _make_capacity(
    num_experts,
    k,
    capacity_factor,
    eval_capacity_factor,
    priority,
    capacity_group,
    renorm_after_drop,
    capacity_shares,
  )
  flags = Flags(
    prefix_safe_train=limit is None or limit.prefix_safe(k, train=True),
    prefix_safe_eval=limit is None or limit.prefix_safe(k, train=False),
    batch_free=limit is None or capacity_group == 'sequence',
    trains_router=weighting != 'unweighted',
    needs_past=limit is not None,
  )
  return Router(
    scorer,
    affinity(function, k),
    TopKAssign(k, weights, route_scale, limit, second_policy, second_threshold),
    num_experts=num_experts,
    flags=flags,
    bias=balance_bias,
    choices=k,
  )


def top_k(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  noise_std: float = 0.0,
  jitter: float = 0.0,
  init_std: float | None = None,
  **options,
) -> Router:
  """Top-k token choice by linear logits.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    k: choices of a token.
    noise_std, jitter, init_std: see `LinearScorer`.
    options: of `token_choice`.

  The routed experts of DeepSeekMoE are `weighting='softmax_topk'` with `init_std=0.006`; its shared experts and its
  fine granularity belong to the layer. With its loss that balances devices, `cluster_balance`, they are `group_limited`
  without a limit (see there).

  Raises:
    ValueError: as `token_choice`.
  """
  scorer = LinearScorer(
    d_model, num_experts, noise_std=noise_std, jitter=jitter, init_std=init_std, rngs=rngs
  )
  return token_choice(scorer, num_experts=num_experts, k=k, **options)


def switch(
  *, capacity_factor: float | None = 1.25, eval_capacity_factor: float | None = 2.0, **options
) -> Router:
  """Switch routing: `top_k` with one choice weighted by its softmax probability (Fedus et al. 2021).

  Options as in `top_k`; capacity 1.25 in training and 2.0 in evaluation, position order; without one in training none
  in evaluation either.
  """
  return top_k(k=1, **_factors(capacity_factor, eval_capacity_factor), **options)


def gshard(
  *,
  capacity_factor: float | None = 1.25,
  eval_capacity_factor: float | None = 2.0,
  priority: str = 'choice_major',
  second_policy: str = 'random',
  **options,
) -> Router:
  """GShard routing: `top_k` with two normalised choices, choice-major capacity and random second choices.

  Lepikhin et al. 2020, algorithm 1, with the random policy's threshold of 0.2 as released in mesh-tensorflow (the
  paper keeps a second choice with probability min(1, 2 g), a threshold of 0.5). Without a capacity in training there
  is none in evaluation either. Not prefix-safe unless `priority='token_major'`.
  """
  factors = _factors(capacity_factor, eval_capacity_factor)
  return top_k(k=2, **factors, priority=priority, second_policy=second_policy, **options)


def _factors(train: float | None, evaluation: float | None) -> dict[str, Any]:
  """Capacity factors of which the one for evaluation is usual: dropless in training is dropless there too."""
  return {
    'capacity_factor': train,
    'eval_capacity_factor': None if train is None else evaluation,
  }


def vmoe(
  *,
  k: int = 2,
  capacity_factor: float | None = 1.05,
  weighting: str = 'softmax_topk',
  priority: str = 'choice_major',
  noise_std: float = 1.0,
  **options,
) -> Router:
  """V-MoE routing: `top_k` of noisy logits with softmax weights as they are (Riquelme et al. 2021, section 2).

  `priority='score'` is batch-prioritised routing (section 4.1), with which `eval_capacity_factor` may go far below 1.
  The paper rounds capacities up to multiples of 4 and makes groups of 8 images; here C is the ceiling, and the group
  the batch. Losses of the paper: `importance` and `load`, 0.005 each, the latter with one threshold for all experts of
  a token as in the released code. Options as in `top_k`. Not prefix-safe.
  """
  return top_k(
    k=k,
    capacity_factor=capacity_factor,
    weighting=weighting,
    priority=priority,
    noise_std=noise_std,
    affinity=functools.partial(TokenAffinity, one_threshold=True),
    **options,
  )


def _make_capacity(
  num_experts: int,
  k: int,
  train_factor: float | None,
  eval_factor: float | None,
  priority: str,
  group: str,
  renorm_after_drop: bool,
  shares: Sequence[int | float] | None,
) -> Capacity | None:
  """What `token_choice` bounds the experts by; None for dropless."""
  check_name('priority', priority, PRIORITIES)
  check_name('capacity_group', group, ('batch', 'sequence'))
  if renorm_after_drop and (train_factor is None or k == 1):
    raise ValueError(
      f'renorm_after_drop=True with k={k}, capacity_factor={train_factor}: accepted with k >= 2, where one choice '
      "does not make the weight 1 and the router's gradient zero, and with a capacity_factor"
    )
  if train_factor is None:
    if eval_factor is not None:
      raise ValueError(
        f'eval_capacity_factor={eval_factor} without capacity_factor: accepted with one, or None'
      )
    if shares is not None:
      raise ValueError('capacity_shares without capacity_factor: accepted with one, or None')
    return None
  eval_factor = train_factor if eval_factor is None else eval_factor
  shares = _check_shares(shares, num_experts)
  return Capacity(train_factor, eval_factor, priority, group, renorm_after_drop, shares)


def _check(num_experts: int, k: int, weighting: str, *factors: float | None) -> None:
  if not 1 <= k <= num_experts:
    raise ValueError(f'k={k} with num_experts={num_experts}: accepted are 1 to {num_experts}')
  check_name('weighting', weighting, WEIGHTINGS)
  if k == 1 and WEIGHTINGS[weighting][1] is normalised:
    raise ValueError(
      f"weighting={weighting!r} with k=1 makes every weight 1 and the router's gradient zero: accepted are "
      "'softmax_topk', 'softmax_topk_norm_sg', 'sigmoid' or k >= 2"
    )
  for factor in factors:
    if factor is not None and not factor > 0:
      raise ValueError(
        f'capacity_factor={factor}: accepted are positive numbers, or None for dropless'
      )


def _check_shares(
  shares: Sequence[int | float] | None, num_experts: int
) -> tuple[float, ...] | None:
  if shares is not None and (len(shares) != num_experts or any(not s > 0 for s in shares)):
    raise ValueError(
      f'capacity_shares={tuple(shares)}: accepted are {num_experts} positive numbers'
    )
  return None if shares is None else tuple(float(share) for share in shares)


def check_name(key: str, value: str, accepted) -> None:
  """Raises ValueError for a value that is not accepted."""
  if value not in accepted:
    raise ValueError(f'{key}={value!r}: accepted are {", ".join(map(repr, accepted))}')
