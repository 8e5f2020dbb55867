"""Noisy top-k gating: noise whose size is learnt (Shazeer et al. 2017, "Outrageously large neural networks")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.router import Router
from moejax.routers.scorers import check_key
from moejax.routers.top_k import token_choice
from moejax.transformer.linear import product


class NoisyScorer(nnx.Module):
  """Logits `x W`, and in training noise of standard deviation `softplus(x W_noise) + 0.01` for each.

  Args:
    d_model: D.
    num_experts: E.

  Both kernels are zero at first, so that the first choices are random and even. The 0.01 is that of the released
  code (tensor2tensor).
  """

  def __init__(self, d_model: int, num_experts: int):
    self.kernel = nnx.Param(jnp.zeros((d_model, num_experts), jnp.float32))
    self.noise_kernel = nnx.Param(jnp.zeros((d_model, num_experts), jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], Float[Array, 'B S E'] | None]:
    """Clean logits and the standard deviation of their noise (None outside of training).

    Raises:
      ValueError: in training without `context.rng`.
    """
    kernels = (self.kernel, self.noise_kernel)
    logits_bse, raw_bse = (product(x_bsd, kernel[...].astype(x_bsd.dtype)) for kernel in kernels)
    if not context.train:
      return logits_bse, None
    check_key(context, 'noisy_top_k')
    return logits_bse, jax.nn.softplus(raw_bse) + jnp.asarray(0.01, raw_bse.dtype)


def noisy_top_k(*, d_model: int, num_experts: int, rngs: nnx.Rngs, k: int = 4, **options) -> Router:
  """Top-k of noisy logits, weights a softmax over the chosen (section 2.1 and appendix A).

  Losses of the paper: `importance` and `load`, 0.1 each in its language models, 0.01 in tensor2tensor. In
  evaluation no noise. The threshold of the load probability has no gradient here (in tensor2tensor it has). Options
  as in `token_choice`; the hierarchical gate of the paper is not here.

  Args:
    d_model: D.
    num_experts: E.
    rngs: unused, the kernels are zero at first.
    k: choices of a token, 4 in the paper.
    options: of `token_choice`.

  Raises:
    ValueError: as `token_choice`.
  """
  return token_choice(NoisyScorer(d_model, num_experts), num_experts=num_experts, k=k, **options)
