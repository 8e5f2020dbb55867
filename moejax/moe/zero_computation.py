"""Experts that cost no matrix product: zero, copy and constant.

Jin et al. 2024, "MoE++: accelerating mixture-of-experts methods with zero-computation experts", section 3.1.
They are on every device, so their rows never travel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, wide_dtype

KINDS = ('copy', 'constant', 'zero')
"""In the order in which they follow the layer's bank."""


class ZeroExperts(nnx.Module):
  """Copy `x`, constant `a1 x + a2 v` with `[a1, a2] = softmax(x W)`, and zero `0`.

  Args:
    d_model: D.
    counts: kind -> how many, e.g. {'copy': 1, 'constant': 2, 'zero': 1} as in the paper.
    dtype: type of the output.
    rngs: source of the initial W, truncated normal with variance 1 / D, and v, normal with variance 1.

  Raises:
    ValueError: an unknown kind, or a count below 0.
  """

  def __init__(self, d_model: int, counts: Mapping[str, int], *, dtype=jnp.float32, rngs: nnx.Rngs):
    for kind, count in counts.items():
      if kind not in KINDS:
        raise ValueError(f'zero_experts kind {kind!r}: accepted are {", ".join(map(repr, KINDS))}')
      if count < 0:
        raise ValueError(f'zero_experts[{kind!r}]={count}: accepted are integers from 0')
    self.copies, constants, zeros = (counts.get(kind, 0) for kind in KINDS)
    self.constants = constants
    self.num_experts = self.copies + constants + zeros
    self.dtype = jnp.dtype(dtype)
    if constants:
      init = nnx.initializers.truncated_normal(d_model**-0.5)
      self.mix = nnx.Param(init(rngs.params(), (constants, d_model, 2), jnp.float32))
      self.value = nnx.Param(jax.random.normal(rngs.params(), (constants, d_model), jnp.float32))

  def __call__(
    self, x_td: Float[Array, 'T D'], assignment: Assignment, first: int
  ) -> Float[Array, 'T D']:
    """The weighted sum of each token's rows of experts `first` to `first + num_experts - 1`."""
    x_td = x_td.astype(wide_dtype(self.dtype))
    weight_te = row_weights(assignment, first, self.num_experts, x_td.shape[0]).astype(x_td.dtype)
    copied_t = weight_te[:, : self.copies].sum(1)
    if not self.constants:
      return (copied_t[:, None] * x_td).astype(self.dtype)
    weight_te = weight_te[:, self.copies : self.copies + self.constants]
    mix_edo, value_ed = (p[...].astype(x_td.dtype) for p in (self.mix, self.value))
    share_teo = jax.nn.softmax(jnp.einsum('TD,EDO->TEO', x_td, mix_edo), -1)
    copied_t = copied_t + (weight_te * share_teo[..., 0]).sum(1)
    constant_td = jnp.einsum('TE,ED->TD', weight_te * share_teo[..., 1], value_ed)
    return (copied_t[:, None] * x_td + constant_td).astype(self.dtype)

  def expert(self, index: int) -> Callable[[Array], Array]:
    """One expert as a function `[..., D] -> [..., D]`: what the oracle loops over."""
    if index < self.copies:
      return lambda x: x
    constant = index - self.copies
    if constant >= self.constants:
      return jnp.zeros_like

    def apply(x: Array) -> Array:
      mix_do, value_d = (p[...].astype(x.dtype)[constant] for p in (self.mix, self.value))
      share = jax.nn.softmax(x @ mix_do, -1)
      return share[..., :1] * x + share[..., 1:] * value_d.reshape((1,) * (x.ndim - 1) + (-1,))

    return apply


def row_weights(
  assignment: Assignment, first: int, num_experts: int, num_tokens: int
) -> Float[Array, 'T E']:
  """Combine weights of the experts from `first` on; of token-major rows without a scatter."""
  expert_r = assignment.expert - first
  if assignment.groups == num_tokens:
    mine_tke = expert_r.reshape(num_tokens, -1, 1) == jnp.arange(num_experts)[None, None]
    return jnp.where(mine_tke, assignment.weight.reshape(num_tokens, -1, 1), 0).sum(1)
  expert_r = jnp.where((expert_r < 0) | (expert_r > num_experts), num_experts, expert_r)
  weight_te = jnp.zeros((num_tokens, num_experts + 1), assignment.weight.dtype)
  return weight_te.at[assignment.token, expert_r].add(assignment.weight)[:, :-1]


def rows_of_bank(assignment: Assignment, num_experts: int) -> Assignment:
  """The assignment as the bank of the first `num_experts` experts sees it: the other rows are dropped there."""
  if assignment.num_experts == num_experts:
    return assignment
  inside_r = assignment.expert < num_experts
  return dataclasses.replace(
    assignment,
    expert=jnp.where(inside_r, assignment.expert, num_experts),
    weight=jnp.where(inside_r, assignment.weight, 0),
    chosen=jnp.minimum(assignment.chosen, num_experts),
    num_experts=num_experts,
  )
