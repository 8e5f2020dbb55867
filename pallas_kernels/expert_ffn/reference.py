"""The definition of `expert_ffn`: a dense loop over experts, differentiated by JAX."""

import jax.numpy as jnp

from ..activations import hidden
from ..registry import accumulator


def expert_ffn(x, assignment, w_gate, w_up, w_down, *, activation):
  """Every expert on every row; see the contract in `__init__`."""
  acc = accumulator(x, w_up)
  token, weight = assignment.token, assignment.weight.astype(acc)
  into = (w_up,) if w_gate is None else (w_gate, w_up)
  y_td = jnp.zeros(x.shape, acc)
  for e in range(assignment.num_experts):
    chosen = (assignment.expert == e)[:, None]
    # Masked on both sides of the products: a NaN of another expert's row, or of its gradient, times zero
    # is a NaN.
    x_rd = jnp.where(chosen, x[token].astype(acc), 0)
    a_rf = hidden(activation, tuple(x_rd @ w[e].astype(acc) for w in into))
    y_rd = (a_rf @ w_down[e].astype(acc)) * jnp.where(chosen, weight[:, None], 0)
    y_td = y_td.at[token].add(jnp.where(chosen, y_rd, 0))
  return y_td.astype(x.dtype)
