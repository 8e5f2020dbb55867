"""The rows of a device: what of an assignment concerns its tokens, and how their outputs are added up."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moejax.arrays import STATIC, Assignment, wide_dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """R rows (token, expert, weight) of one device.

  Attributes:
    token: int32 `[R]`, index into this device's tokens.
    expert: int32 `[R]`, of all experts; `num_experts` where there is nothing to do.
    weight: `[R]`, zero there.
    num_experts: E, of all devices.
    choices: K where row r is of token r // K, else 0.
    expected: rows that there are to send when every device has the same share.
  """

  token: Array
  expert: Array
  weight: Array
  num_experts: int = dataclasses.field(metadata=STATIC)
  choices: int = dataclasses.field(metadata=STATIC)
  expected: int = dataclasses.field(metadata=STATIC)

  def part(self, index: int, parts: int) -> Rows:
    """One of equal consecutive parts; of token-major rows only."""
    size = self.token.size // parts
    of = slice(index * size, (index + 1) * size)
    return dataclasses.replace(
      self,
      token=self.token[of] - index * (size // self.choices),
      expert=self.expert[of],
      weight=self.weight[of],
      expected=size,
    )

  def assignment(self, num_tokens: int) -> Assignment:
    """These rows as an assignment of `num_tokens` tokens."""
    groups = num_tokens if self.choices else 1
    return Assignment(self.token, self.expert, self.weight, self.expert, self.num_experts, groups)


def local_rows(assignment: Assignment, num_tokens: int, shard, shards: int) -> Rows:
  """The rows of the `num_tokens` tokens of a shard: those that lie here, or those of all that refer to them."""
  token_r = assignment.token - shard * num_tokens
  size, num_experts = assignment.token.size, assignment.num_experts
  if assignment.groups % shards == 0:  # rows lie beside their tokens
    major = assignment.groups == num_tokens * shards
    rows = (token_r, assignment.expert, assignment.weight)
    return Rows(*rows, num_experts, size // num_tokens if major else 0, size)
  mine_r = (token_r >= 0) & (token_r < num_tokens)
  rows = (
    jnp.clip(token_r, 0, num_tokens - 1),
    jnp.where(mine_r, assignment.expert, num_experts),
    jnp.where(mine_r, assignment.weight, 0),
  )
  return Rows(*rows, num_experts, 0, -(-size // shards))


def add_up(
  y_rd: Float[Array, 'R D'], rows: Rows, arrived_r: Bool[Array, ' R'], num_tokens: int
) -> Float[Array, 'T D']:
  """Weighted sum of each token's rows. Masked before the weight is applied, so that no NaN crosses over."""
  wide = wide_dtype(y_rd.dtype)
  y_rd = jnp.where(arrived_r[:, None], y_rd, 0).astype(wide)
  y_rd = y_rd * rows.weight.astype(wide)[:, None]
  if rows.choices:
    y_td = y_rd.reshape(num_tokens, rows.choices, -1).sum(1)
  else:
    y_td = jnp.zeros((num_tokens, y_rd.shape[1]), wide).at[rows.token].add(y_rd)
  return y_td


@jax.custom_vjp
def take(values: Float[Array, 'N D'], index_m: Array, inverse_n: Array) -> Float[Array, 'M D']:
  """`values[index]`, zeros where an index is past the end. `inverse_n [N]` (or `[N, K]`) says which results a value is
  in, so that the gradient is a gather as well: no scatter, no order of additions left to the device."""
  return _take(values, index_m)


def _take(values: Array, index: Array) -> Array:
  inside = index < values.shape[0]
  return jnp.where(inside[:, None], values.at[index].get(mode='clip'), 0)


def _take_forward(values, index_m, inverse_n):
  return _take(values, index_m), inverse_n


def _take_backward(inverse_n, d_md):
  if inverse_n.ndim == 1:
    return _take(d_md, inverse_n), None, None
  num, many = inverse_n.shape
  d_nkd = _take(d_md, inverse_n.reshape(-1)).reshape(num, many, -1)
  return d_nkd.sum(1), None, None


take.defvjp(_take_forward, _take_backward)
