"""A bank of E feed-forward experts of one shape."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moejax.arrays import Assignment
from moejax.sizes import check_made_of
from pallas_kernels import check_activation, expert_ffn, grouped_matmul, hidden


class Experts(nnx.Module):
  """`(act(x w_gate) * (x w_up)) w_down`, or `act(x w_up) w_down` when not gated; float32 master weights.

  Args:
    d_model: D.
    d_ff: F.
    num_experts: E.
    activation: 'silu', 'gelu', 'relu' or 'relu2'.
    gated: gated linear unit (Shazeer 2020, "GLU variants improve transformer") or plain.
    dtype: type of the computation.
    out_scale: factor on the standard deviation of the initial output weights, such as 1 / sqrt(2 L) of L layers.
    rngs: source of the initial weights, truncated normal with variance 1 / fan-in.
  """

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    num_experts: int,
    *,
    activation: str = 'silu',
    gated: bool = True,
    dtype=jnp.float32,
    out_scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_made_of(rngs, d_model=d_model, d_ff=d_ff, num_experts=num_experts)
    check_activation(activation)

    def kernel(d_in: int, d_out: int, scale: float = 1.0) -> nnx.Param:
      init = nnx.initializers.truncated_normal(scale * d_in**-0.5)
      return nnx.Param(init(rngs.params(), (num_experts, d_in, d_out), jnp.float32))

    self.w_gate = kernel(d_model, d_ff) if gated else None
    self.w_up = kernel(d_model, d_ff)
    self.w_down = kernel(d_ff, d_model, out_scale)
    self.activation = activation
    self.dtype = jnp.dtype(dtype)

  @property
  def num_experts(self) -> int:
    """E, the experts held here (under `shard_map`, those of the shard)."""
    return self.w_up.shape[0]

  def weights(self) -> tuple[Array | None, Array, Array]:
    """`(w_gate or None, w_up, w_down)` in the type of the computation."""
    gate = None if self.w_gate is None else self.w_gate[...].astype(self.dtype)
    return gate, self.w_up[...].astype(self.dtype), self.w_down[...].astype(self.dtype)

  def __call__(
    self,
    x_rd: Float[Array, 'R D'],
    group_sizes_e: Int[Array, ' E'],
    *,
    implementation: str | None = None,
  ) -> Float[Array, 'R D']:
    """Rows sorted by expert; rows past the last group come out as zeros.

    `implementation`: a body of `pallas_kernels.grouped_matmul`; None: the one of the platform.
    """
    into, w_down = self._into_and_down()
    matmul = functools.partial(grouped_matmul, implementation=implementation)
    pre = tuple(matmul(x_rd.astype(self.dtype), w, group_sizes_e) for w in into)
    return matmul(hidden(self.activation, pre), w_down, group_sizes_e)

  def ffn(
    self,
    x_td: Float[Array, 'T D'],
    assignment: Assignment,
    *,
    implementation: str | None = None,
  ) -> Float[Array, 'T D']:
    """Gather, experts and weighted combine in one operation.

    `implementation`: a body of `pallas_kernels.expert_ffn`; None: the one of the platform.
    """
    w_gate, w_up, w_down = self.weights()
    return expert_ffn(
      x_td.astype(self.dtype),
      assignment,
      w_gate,
      w_up,
      w_down,
      activation=self.activation,
      implementation=implementation,
    )

  def slots(self, x_bepd: Float[Array, 'B E P D']) -> Float[Array, 'B E P D']:
    """Every expert on its own slots: equal loads, so batched matmuls.

    Experts come first, with the slots of all sequences as the rows of one matrix: XLA on CPUs is slower at products
    whose rows are two axes with the experts between them.
    """
    into, w_down = self._into_and_down()
    b, e, p, d = x_bepd.shape
    x_erd = x_bepd.astype(self.dtype).transpose(1, 0, 2, 3).reshape(e, b * p, d)
    pre = tuple(jnp.matmul(x_erd, w) for w in into)
    y_erd = jnp.matmul(hidden(self.activation, pre), w_down)
    return y_erd.reshape(e, b, p, d).transpose(1, 0, 2, 3)

  def expert(self, index: int) -> Callable[[Array], Array]:
    """One expert as a function `[..., D] -> [..., D]`: what the oracle loops over."""
    into, w_down = self._into_and_down()

    def apply(x: Array) -> Array:
      x = x.astype(self.dtype)
      return hidden(self.activation, tuple(x @ w[index] for w in into)) @ w_down[index]

    return apply

  def _into_and_down(self) -> tuple[tuple[Array, ...], Array]:
    """`((w_gate, w_up) or (w_up,), w_down)`."""
    w_gate, w_up, w_down = self.weights()
    return (w_up,) if w_gate is None else (w_gate, w_up), w_down
