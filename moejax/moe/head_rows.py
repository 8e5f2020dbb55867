"""Where rows of heads that are experts are worked on: beside their tokens, on one device or on every one of a mesh."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from pallas_kernels import grouped_matmul, pack

_GATHERED = 'gathered heads'


@runtime_checkable
class RowWork(Protocol):
  """The work of the experts of one projection."""

  def __call__(self, x_td: Array, expert_r: Array, kernel: Array, wide: int) -> Array:
    """`[R, D_out]`: row r, which is of token r // (R / T), times the matrix of its expert; zero where that is E.

    Args:
      x_td: `[T, D_in]`.
      expert_r: int32 `[R]`.
      kernel: `[E, D_in, D_out]`, in the type of x.
      wide: the axis of the kernel that is as long as the model is wide.
    """


def by_expert(
  x_td: Float[Array, 'T D_in'],
  expert_r: Int32[Array, ' R'],
  kernel: Float[Array, 'E D_in D_out'],
  wide: int = 1,
) -> Float[Array, 'R D_out']:
  """As `RowWork`, on one device."""
  order_r, back_r, starts = pack(expert_r, kernel.shape[0])
  x_rd = x_td[order_r // (expert_r.size // x_td.shape[0])]
  return grouped_matmul(x_rd, kernel, jnp.diff(starts))[back_r]


@dataclasses.dataclass(frozen=True)
class BesideTokens:
  """`by_expert` on every device of a mesh with its own tokens: no row travels.

  Matrices, which are sharded for memory alone, are gathered for it in the type that they come in, and again in the
  backward pass; the sum of their gradients is scattered. Left to itself the compiler sorts the rows of all devices on
  each of them.

  Attributes:
    mesh: the mesh.
    batch_axes: mesh axes that tokens are sharded over.
    fsdp_axis: the one among them that matrices are sharded over, by the width of the model.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]
  fsdp_axis: str = 'fsdp'

  def __call__(self, x_td: Array, expert_r: Array, kernel: Array, wide: int) -> Array:
    """As `RowWork`; tokens must divide over the axes of the batch."""
    cut = self.mesh.shape.get(self.fsdp_axis, 1) > 1
    axes = [self.fsdp_axis if cut and axis == wide else None for axis in range(3)]

    def on_device(x_td, expert_r, kernel):
      if cut:
        kernel = jax.lax.all_gather(kernel, self.fsdp_axis, axis=wide, tiled=True)
      return by_expert(x_td, expert_r, checkpoint_name(kernel, _GATHERED))

    policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
    rows = P(self.batch_axes)
    run = jax.shard_map(
      jax.checkpoint(on_device, policy=policy) if cut else on_device,
      mesh=self.mesh,
      in_specs=(rows, rows, P(*axes)),
      out_specs=rows,
      check_vma=True,
    )
    return run(x_td, expert_r, kernel)
