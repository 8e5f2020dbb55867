"""Modified softmax gating: the router sees a bounded function of the token (Nguyen et al. 2024, "A general theory for
softmax gating multinomial logistic mixture of experts")."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router
from moejax.routers.top_k import check_name, token_choice
from moejax.transformer.linear import product

FUNCTIONS: dict[str, Callable[[Array], Array]] = {
  'cos': jnp.cos,
  'identity': lambda x: x,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
}


class ModifiedScorer(nnx.Module):
  """`logits = M(x) W + b`.

  Args:
    d_model: D.
    num_experts: E.
    function: a name of FUNCTIONS, M.
    rngs: source of the initial kernel, of variance 1 / D; b is zero at first.
  """

  def __init__(self, d_model: int, num_experts: int, function: str, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts), jnp.float32))
    self.offset = nnx.Param(jnp.zeros(num_experts, jnp.float32))
    self.function = function

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits, bounded where M is."""
    kernel_de, offset_e = (w[...].astype(x_bsd.dtype) for w in (self.kernel, self.offset))
    logits_bse = product(FUNCTIONS[self.function](x_bsd), kernel_de)
    return logits_bse + offset_e[None, None], None


def modified_softmax(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  function: str = 'sigmoid',
  **options,
) -> Router:
  """Top-k token choice by `softmax(M(x) W + b)`.

  The paper's theory: with M other than the identity, gate and experts do not interact in x, and parameters are
  found at a polynomial rate also where experts have slopes that vanish. Sparse choice is ours.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernel.
    k: choices of a token.
    function: M elementwise, 'sigmoid', 'tanh', 'cos', or 'identity' for plain softmax gating with an offset.
    options: of `token_choice`.

  Raises:
    ValueError: an unknown function, or as `token_choice`.
  """
  check_name('function', function, FUNCTIONS)
  scorer = ModifiedScorer(d_model, num_experts, function, rngs=rngs)
  return token_choice(scorer, num_experts=num_experts, k=k, **options)
