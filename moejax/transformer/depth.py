"""Mixture of Depths: a block works on some of the tokens, the others skip it (Raposo et al. 2024, "Mixture-of-depths:
dynamically allocating compute in transformer-based language models").

In training the C tokens of a sequence with the largest router score r = w . x go through the block, attention and
feed-forward layer alike, at their own positions and among themselves (equation 1 of the paper):

  out_t = x_t + r_t (block(x)_t - x_t)   of the chosen,   x_t   of the others

Which tokens are among the C largest depends on later ones. So training is not prefix-safe; outside of it a token goes
through the block if it says so by itself: a predictor of the choice, trained beside, or the router's own sigmoid. No
number of tokens is fixed then: all are worked on, and those that skip are hidden from the others.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moejax.arrays import Context, RoutingStats, wide_dtype
from moejax.routers.router import Flags, previous_ids
from moejax.transformer.attention import Visible
from moejax.transformer.block import Block
from moejax.transformer.linear import Linear, product

DECIDE = ('predictor', 'router')


@dataclasses.dataclass(frozen=True)
class Depth:
  """Which layers are blocks that tokens may skip, and how.

  Attributes:
    layers: their numbers; every other one in the paper.
    capacity: C as a fraction of the sequence, rounded up; 0.125 in the paper.
    decide: who chooses outside of training. 'predictor': two layers on x, which has no gradient of it; 'router': the
      router's scores, which the same loss moves.

  The loss `guidance` of the part 'depth' is the cross-entropy of that decision with the choice of training. Its
  coefficient is not published; 0.01 here.

  Raises:
    ValueError: an option out of its range.
  """

  layers: tuple[int, ...] = ()
  capacity: float = 0.125
  decide: str = 'predictor'

  def __post_init__(self):
    if not 0 < self.capacity <= 1:
      raise ValueError(f'capacity={self.capacity}: accepted are numbers above 0, up to 1')
    if self.decide not in DECIDE:
      raise ValueError(f'decide={self.decide!r}: accepted are {", ".join(map(repr, DECIDE))}')

  def flops_per_token(self, d_model: int) -> int:
    """Of the router, and of the predictor where there is one."""
    return 2 * d_model + (2 * (d_model + 1) * _width(d_model) if self.decide == 'predictor' else 0)


class DepthRouter(nnx.Module):
  """The score of a token, and the logit by which it decides for itself.

  Args:
    d_model: D.
    decide: see `Depth`.
    rngs: source of the initial weights, variance 1 / fan-in.
  """

  def __init__(self, d_model: int, decide: str, *, rngs: nnx.Rngs):
    self.score = Linear(d_model, 1, rngs=rngs)
    alone = decide == 'predictor'
    self.hidden = Linear(d_model, _width(d_model), use_bias=True, rngs=rngs) if alone else None
    self.out = Linear(_width(d_model), 1, use_bias=True, rngs=rngs) if alone else None

  def __call__(self, x_bsd: Array) -> tuple[Float[Array, 'B S'], Float[Array, 'B S']]:
    """Score and logit, float32 or wider."""
    x_bsd = x_bsd.astype(wide_dtype(x_bsd.dtype))
    score_bs = _product(self.score, x_bsd)[..., 0]
    if self.hidden is None:
      return score_bs, score_bs
    h = jax.nn.relu(_product(self.hidden, jax.lax.stop_gradient(x_bsd)))
    return score_bs, _product(self.out, h)[..., 0]


class SkippedBlock(nnx.Module):
  """A block that some tokens skip; called as `Block` is.

  Args:
    block: what the others go through. No router in it may have a state over depth, or share something with others.
    depth: see `Depth`.
    causal: whether the block's attention is.
    d_model, rngs: of the router.
  """

  flags = Flags(prefix_safe_train=False, prefix_safe_eval=True, batch_free=True)

  def __init__(self, d_model: int, block: Block, depth: Depth, *, causal: bool, rngs: nnx.Rngs):
    self.block = block
    self.router = DepthRouter(d_model, depth.decide, rngs=rngs)
    self.capacity, self.causal = depth.capacity, causal

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    context: Context,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    visible: Visible | None = None,
  ) -> tuple[Float[Array, 'B S D'], tuple[RoutingStats, ...], dict[str, Array]]:
    """Output, the routing sums of the block's routed layers and of this choice, and the state, which is empty.

    Raises:
      ValueError: a state over depth, which some tokens would lack, or what routers share, which is of all tokens.
    """
    if context.shared:
      raise ValueError(
        f'shared {", ".join(context.shared)} in a block that tokens skip: accepted are routers that share nothing'
      )
    if context.state:
      raise ValueError(
        f'state {", ".join(context.state)} in a block that tokens skip: accepted are routers without a state'
      )
    score_bs, logit_bs = self.router(x)
    mask_bs = jnp.ones(x.shape[:2], bool) if context.mask is None else context.mask
    order_bc = self._largest(score_bs, mask_bs)
    chosen_bs = jnp.zeros_like(mask_bs).at[_rows(order_bc), order_bc].set(True) & mask_bs
    if context.train:
      y, stats, _ = self._gathered(x, order_bc, chosen_bs, context, rotation, visible)
      through_bs = chosen_bs
    else:
      through_bs = (logit_bs > 0) & mask_bs
      seen = _hide(visible, through_bs, self.causal)
      y, stats, _ = self.block(x, dataclasses.replace(context, mask=through_bs), rotation, seen)
    change = (y - x).astype(score_bs.dtype) * score_bs[..., None]
    out = x + jnp.where(through_bs[..., None], change, 0).astype(x.dtype)
    own = _stats(score_bs, logit_bs, chosen_bs, through_bs, mask_bs)
    return out, (*stats, own), {}

  def initial_state(self, x: Float[Array, 'B S D']) -> dict[str, Array]:
    """As of `Block`."""
    return self.block.initial_state(x)

  def _largest(self, score_bs: Array, mask_bs: Array) -> Array:
    """`[B, C]`: positions of the C largest scores of real tokens, ascending."""
    places = math.ceil(self.capacity * score_bs.shape[1] - 1e-9)
    _, order_bc = jax.lax.top_k(jnp.where(mask_bs, score_bs, -jnp.inf), places)
    return jnp.sort(order_bc, axis=1).astype(jnp.int32)

  def _gathered(self, x, order_bc, chosen_bs, context: Context, rotation, visible):
    """The block on `[B, C, D]`, put back where the tokens were; zero elsewhere."""
    take = lambda a: jnp.take_along_axis(
      a, order_bc.reshape(*order_bc.shape, *(1,) * (a.ndim - 2)), 1
    )
    own = {name: getattr(context, name) for name in ('token_ids', 'positions')}
    own['previous_ids'] = previous_ids(context)
    own = {name: None if value is None else take(value) for name, value in own.items()}
    if context.domain is not None and context.domain.ndim == 3:
      own['domain'] = take(context.domain)
    if context.maps is not None:
      own['maps'] = jnp.take_along_axis(context.maps, order_bc[:, None], 2)
    real_bc = take(chosen_bs)
    own['mask'] = None if context.mask is None else real_bc
    if rotation is not None:
      every = lambda a: jnp.broadcast_to(a, (x.shape[0], *a.shape[1:]))
      rotation = (take(every(rotation[0])), take(every(rotation[1])))
    if visible is not None:
      keys = jnp.take_along_axis(take(visible.keys), order_bc[:, None], 2)
      visible = _hide(Visible(keys, real_bc), real_bc, self.causal)
    y, stats, state = self.block(take(x), dataclasses.replace(context, **own), rotation, visible)
    return jnp.zeros_like(x).at[_rows(order_bc), order_bc].set(y), stats, state


def _width(d_model: int) -> int:
  """Hidden width of the predictor."""
  return max(8, d_model // 4)


def _product(linear: Any, x: Array) -> Array:
  """In the type of x, float32 or wider, whatever the layer computes in."""
  y = product(x, linear.weight[...].astype(x.dtype), precision='highest')
  return y if linear.bias is None else y + linear.bias[...].astype(x.dtype)[None, None]


def _rows(order_bc: Array) -> Array:
  return jnp.arange(order_bc.shape[0], dtype=jnp.int32)[:, None]


def _hide(visible: Visible | None, through_bs: Bool[Array, 'B S'], causal: bool) -> Visible:
  """Only these tokens are seen, by each other."""
  keys = jnp.broadcast_to(through_bs[:, None], (*through_bs.shape, through_bs.shape[1]))
  keys = keys if visible is None else keys & visible.keys
  size = through_bs.shape[1]
  reachable = keys & jnp.tri(size, dtype=bool)[None] if causal else keys
  return Visible(keys=keys, rows=reachable.any(-1) & through_bs)


def _stats(score_bs, logit_bs, chosen_bs, through_bs, mask_bs) -> RoutingStats:
  """Sums over real tokens, of one expert: the block."""
  dtype = score_bs.dtype
  chosen = jnp.where(mask_bs, chosen_bs, False).astype(dtype)
  entropy_bs = (
    jnp.logaddexp(0, logit_bs) - chosen * logit_bs
  )  # binary cross-entropy with the choice
  zero, tokens = jnp.zeros((), dtype), mask_bs.sum(dtype=dtype)
  through = through_bs.sum(dtype=dtype)
  weight = jax.lax.stop_gradient(jnp.where(through_bs, score_bs, 0)).sum()
  return RoutingStats(
    tokens=tokens,
    chosen_e=through[None],
    kept_e=through[None],
    prob_e=jnp.where(mask_bs, jax.nn.sigmoid(logit_bs), 0).sum()[None],
    weight_e=weight[None],
    load_e=through[None],
    z=zero,
    entropy=zero,
    sequence_balance=zero,
    unrouted=tokens - through,
    sparsity=zero,
    guidance=jnp.where(mask_bs, entropy_bs, 0).sum(),
    part='depth',
  )
