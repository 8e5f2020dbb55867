"""Cosine router: logits are cosines in a narrow space (X-MoE, Chi et al. 2022, "On the representation collapse of
sparse mixture of experts")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router
from moejax.routers.scorers import check_from_one
from moejax.routers.top_k import token_choice
from moejax.transformer.linear import product


class CosineScorer(nnx.Module):
  """`logits = cos(x W, c_e) / temperature`.

  Args:
    d_model: D.
    num_experts: E.
    width: of the space in which tokens and experts meet.
    temperature: at first; learnt, and used as at least 1e-4.
    rngs: source of the initial projection (variance 1 / D) and centroids (orthogonal, of length 0.32 as in
      torchscale).
  """

  def __init__(
    self, d_model: int, num_experts: int, width: int, temperature: float, *, rngs: nnx.Rngs
  ):
    project = nnx.initializers.truncated_normal(d_model**-0.5)
    centroids = nnx.initializers.orthogonal(0.32)
    self.kernel = nnx.Param(project(rngs.params(), (d_model, width), jnp.float32))
    self.centroids = nnx.Param(centroids(rngs.params(), (num_experts, width), jnp.float32))
    self.temperature = nnx.Param(jnp.asarray(temperature, jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits between -1 / temperature and 1 / temperature."""
    dtype = x_bsd.dtype
    low = product(x_bsd, self.kernel[...].astype(dtype))
    centroids = self.centroids[...].astype(dtype)
    cosine_bse = product(unit(low), unit(centroids).T)
    return cosine_bse / jnp.maximum(self.temperature[...].astype(dtype), 1e-4), None


def unit(x: Float[Array, '*batch width']) -> Float[Array, '*batch width']:
  """Vectors of length one; zero stays zero."""
  square = jnp.maximum((x * x).sum(-1, keepdims=True), jnp.asarray(1e-12, x.dtype))
  return x * jax.lax.rsqrt(square)


def cosine(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 1,
  width: int | None = None,
  temperature: float = 0.07,
  **options,
) -> Router:
  """Top-k token choice by cosines (section 4 of the paper).

  The paper uses k = 1 with the softmax gate of Switch and its balance loss (0.01). Tokens and centroids are both
  scaled to unit length as in the paper; the released code (torchscale) leaves tokens as they are and rescales
  centroids to length 1.5 in every call.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial parameters.
    k: choices of a token.
    width: of the space in which tokens and experts meet; default E / 2 as in the paper, at least 2.
    temperature: at first; 0.07 in the paper.
    options: of `token_choice`.

  Raises:
    ValueError: an option out of its range.
  """
  width = max(2, num_experts // 2) if width is None else width
  check_from_one(width=width)
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: accepted are positive numbers')
  scorer = CosineScorer(d_model, num_experts, width, temperature, rngs=rngs)
  return token_choice(scorer, num_experts=num_experts, k=k, **options)
