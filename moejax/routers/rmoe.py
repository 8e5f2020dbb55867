"""Recurrent router: a GRU that runs over depth, token by token (Qiu et al. 2024, "Layerwise recurrent router for
mixture-of-experts", RMoE)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router, with_flags
from moejax.routers.scorers import check_from_one
from moejax.routers.top_k import token_choice
from moejax.transformer.linear import product

HIDDEN, CELL = 'rmoe_hidden', 'rmoe_cell'
"""Names in `context.state` and `context.shared`."""


class GRUCell(nnx.Module):
  """Weights of a gated recurrent unit of `width`; inputs are as wide as the state.

  Called by a stack, before its first layer, it gives the routers of all layers these weights.

  Args:
    width: R.
    rngs: source of the initial weights, variance 1 / R; offsets are zero at first.
  """

  def __init__(self, width: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(width**-0.5)
    self.into = nnx.Param(init(rngs.params(), (width, 3 * width), jnp.float32))
    self.over = nnx.Param(init(rngs.params(), (width, 3 * width), jnp.float32))
    self.offset = nnx.Param(jnp.zeros(3 * width, jnp.float32))
    self.over_offset = nnx.Param(jnp.zeros(3 * width, jnp.float32))

  def weights(self) -> dict[str, Array]:
    """What `gru` takes."""
    names = ('into', 'over', 'offset', 'over_offset')
    return {name: getattr(self, name)[...] for name in names}

  def __call__(self, x: Array, context: Context, visible=None) -> dict[str, Any]:
    return {CELL: self.weights()}


def gru(
  cell: dict[str, Array], z: Float[Array, '*batch width'], hidden: Float[Array, '*batch width']
) -> Float[Array, '*batch width']:
  """The next state: reset r, update u, `n = tanh(W z + r * (U h))`, `(1 - u) * n + u * h` (Cho et al. 2014, with
  the reset after the product as in the usual libraries)."""
  into, over, offset, over_offset = (
    cell[name].astype(z.dtype) for name in ('into', 'over', 'offset', 'over_offset')
  )
  lead = (None,) * (z.ndim - 1)
  in_r, in_u, in_n = jnp.split(product(z, into) + offset[lead], 3, -1)
  over_r, over_u, over_n = jnp.split(product(hidden, over) + over_offset[lead], 3, -1)
  reset, update = jax.nn.sigmoid(in_r + over_r), jax.nn.sigmoid(in_u + over_u)
  new = jnp.tanh(in_n + reset * over_n)
  return (1 - update) * new + update * hidden


class RecurrentScorer(nnx.Module):
  """`h_l = gru(x W_1, h_(l-1))`, `logits = h_l W_2`, h of the layer below in `context.state`.

  Args:
    d_model: D.
    num_experts: E.
    width: R.
    share_cell: the cell is `context.shared`'s.
    detach: no gradient flows into the layers below through h.
    rngs: source of the initial weights, variance 1 / fan-in.
  """

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    width: int,
    *,
    share_cell: bool,
    detach: bool,
    rngs: nnx.Rngs,
  ):
    down = nnx.initializers.truncated_normal(d_model**-0.5)
    up = nnx.initializers.truncated_normal(width**-0.5)
    self.project = nnx.Param(down(rngs.params(), (d_model, width), jnp.float32))
    self.kernel = nnx.Param(up(rngs.params(), (width, num_experts), jnp.float32))
    self.cell = None if share_cell else GRUCell(width, rngs=rngs)
    self.width = width
    self.detach = detach

  def initial_state(self, shape: tuple[int, int], dtype) -> dict[str, Array]:
    """Zeros: the first layer has nothing to remember."""
    return {HIDDEN: jnp.zeros((*shape, self.width), dtype)}

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None, dict[str, Array]]:
    """Logits and the state.

    Raises:
      ValueError: with a shared cell without `context.shared`.
    """
    dtype = x_bsd.dtype
    if self.cell is not None:
      cell = self.cell.weights()
    elif context.shared is not None and CELL in context.shared:
      cell = context.shared[CELL]
    else:
      raise ValueError(
        'rmoe with share_cell=True needs the cell of a stack: pass moe_shared to the model, or context.shared'
      )
    hidden = context.state[HIDDEN]
    hidden = jax.lax.stop_gradient(hidden) if self.detach else hidden
    hidden = gru(cell, product(x_bsd, self.project[...].astype(dtype)), hidden)
    return product(hidden, self.kernel[...].astype(dtype)), None, {HIDDEN: hidden}


def rmoe(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  width: int = 256,
  share_cell: bool = False,
  detach: bool = False,
  **options,
) -> Router:
  """Top-k token choice by a state that every token carries from layer to layer (section 3.1 of the paper).

  The paper has k = 2, weights normalised over the chosen, width 256, one cell for all layers and the loss `balance`
  with 0.001. The recurrence is over layers, so that decoding needs no cache for it. Layers without a mixture pass the
  state on. Released code has the same equations.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial weights.
    k: choices of a token.
    width: R, of the state.
    share_cell: one cell for all layers, which the stack keeps (the paper). False: one a layer, so that the layer works
      alone.
    detach: the state has no gradient into the layers below (ablation of the paper).
    options: of `token_choice`.

  Raises:
    ValueError: width below 1, or as `token_choice`; when called, a shared cell that nobody shares.
  """
  check_from_one(width=width)
  scorer = RecurrentScorer(
    d_model, num_experts, width, share_cell=share_cell, detach=detach, rngs=rngs
  )
  return with_flags(token_choice(scorer, num_experts=num_experts, k=k, **options), has_state=True)


def rmoe_shared(
  *, width: int = 256, share_cell: bool = False, rngs: nnx.Rngs, **options
) -> GRUCell | None:
  """What a stack of such routers shares; arguments as of `rmoe`."""
  return GRUCell(width, rngs=rngs) if share_cell else None
