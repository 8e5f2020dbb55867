"""`expert_ffn` on packed rows: rows of tokens gathered by XLA, the kernels of a platform, a gather and weighted sum.

Between forward and backward only x and the pre-activations are kept. The backward gathers the rows of x and dy anew,
and what its first kernel gives is all that the gradients of the weights and that of x read (SonicMoE,
arXiv 2512.14080, section 3).
"""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from ..packed import Plan, iota, take

Array = jax.Array


@runtime_checkable
class Kernels(Protocol):
  """Products of packed rows, each with the matrices of its expert. Rows past the last group may hold anything.

  `dpre`: gradients of the pre-activations, in the form that the kernels give to each other.
  """

  def up(self, x_rd: Array, save: int) -> tuple[Array, Array | None]:
    """(the hidden layer `[R, F]`, pre-activations `[1 or 2, save, F]` or None where `save` is 0)."""

  def down(self, a_rf: Array) -> Array:
    """`[R, D]`."""

  def hidden_gradient(self, dy_rd: Array, weight_r: Array, pre: Array) -> tuple[Any, Array, Array]:
    """(dpre, weight * hidden layer `[R, F]`, <hidden layer, dy w_down^T> `[R]`)."""

  def input_gradient(self, dpre: Any) -> Array:
    """`dgate w_gate^T + dup w_up^T`, `[R, D]`."""

  def weight_gradients(
    self, x_rd: Array, dpre: Any, a_rf: Array, dy_rd: Array
  ) -> tuple[tuple[Array, ...], Array]:
    """Of `into` and of `w_down`, in their types."""


def saved_rows(num_rows: int, num_experts: int) -> int:
  """See cpu.saved_rows."""
  return num_rows


def forward(kernels: Kernels, x_td, token_r, weight_r, plan: Plan, *, groups, save):
  """Same values as cpu.forward."""
  a_rf, pre = kernels.up(take(x_td, take(token_r, plan.order)), save)
  y_td = combine(kernels.down(a_rf), plan.position, token_r, weight_r, plan, x_td, groups)
  return y_td, pre


def backward(kernels: Kernels, x_td, token_r, weight_r, plan: Plan, pre, dy_td, *, groups):
  """Same values as cpu.backward."""
  row_token = take(token_r, plan.order)
  x_rd, dy_rd = take(x_td, row_token), take(dy_td, row_token)
  kept = iota(token_r.shape[0]) < plan.starts[-1]
  weight = jnp.where(kept, take(weight_r, plan.order), 0)
  dpre, a_rf, dweight = kernels.hidden_gradient(dy_rd, weight, pre)
  dx_rd = kernels.input_gradient(dpre)
  dx_td = combine(dx_rd, plan.position, token_r, None, plan, x_td, groups)
  dweight_r = take(jnp.where(kept, dweight, 0), plan.position).astype(weight_r.dtype)
  return dx_td, dweight_r, *kernels.weight_gradients(x_rd, dpre, a_rf, dy_rd)


def combine(y_pd, place_r, token_r, weight_r, plan: Plan, x_td, groups):
  """Adds up the rows of each token in float32, times their weights if there are any; in the type of `x`.

  `place_r`: where in `y_pd` a row of the assignment lies.
  """
  num_tokens = x_td.shape[0]
  kept_r = plan.position < plan.starts[-1]
  y_rd = jnp.where(kept_r[:, None], take(y_pd, place_r), jnp.zeros((), y_pd.dtype))
  y_rd = y_rd.astype(jnp.float32)
  if weight_r is not None:
    y_rd = y_rd * jnp.where(kept_r, weight_r.astype(jnp.float32), 0)[:, None]
  if groups == num_tokens:  # token-major rows: the sum has a fixed order
    y_td = y_rd.reshape(num_tokens, -1, y_rd.shape[1]).sum(axis=1)  # [T, K, D] -> [T, D]
  else:
    y_td = jnp.zeros(x_td.shape, jnp.float32).at[token_r].add(y_rd)
  return y_td.astype(x_td.dtype)
