"""Controllers: `(state, stats) -> state`, applied once a step, after it, outside the optimizer."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def balance_bias(
  bias_e: Float[Array, '*batch E'], chosen_e: Float[Array, '*batch E'], rate: float
) -> Float[Array, '*batch E']:
  """Loss-free balancing: `b_e + rate * sign(mean(c) - c_e)`.

  Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts", algorithm 1.

  Args:
    bias_e: the bias that moves the selection; a leading layer axis is welcome.
    chosen_e: rows that wanted each expert, before any drop, summed over the mesh and over all microbatches.
    rate: gamma, 1e-3 in the paper; 0 freezes the bias.
  """
  step = jnp.sign(chosen_e.mean(-1, keepdims=True) - chosen_e)
  return bias_e + jnp.asarray(rate, bias_e.dtype) * step.astype(bias_e.dtype)
