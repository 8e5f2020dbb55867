"""Exchange: where tokens travel between devices. Functions `(x_td, assignment, experts, dispatch) -> y_td`.

Routing happens before, on global arrays, so an exchange never changes what is computed, only where. Both mesh
exchanges run under `jax.shard_map` with `check_vma=True`: a value that is claimed to be replicated and is not
does not compile.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moejax.arrays import Assignment
from moejax.moe.dispatch import Dispatch
from moejax.moe.experts import Experts

Exchange = Callable[[Array, Assignment, Experts, Dispatch], Array]


def single(x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch) -> Array:
  """One device: nothing travels."""
  return dispatch(x_td, assignment, experts)


@dataclasses.dataclass(frozen=True)
class Local:
  """Every device works on its own tokens with all experts; nothing but weight gradients travels.

  Attributes:
    mesh: the mesh.
    batch_axes: mesh axes that the tokens are sharded over.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> Array:
    shards = math.prod(self.mesh.shape[a] for a in self.batch_axes)
    _check_divides('tokens', x_td.shape[0], self.batch_axes, shards)
    if assignment.groups % shards:
      raise ValueError(
        f"exchange='local' with routing groups that span the {shards} shards of the batch: accepted is "
        "exchange='all_gather', or a router whose rows stay in their sequence"
      )
    graphdef, weights = nnx.split(experts)

    def body(x_td, assignment, weights):
      shard = _linear_index(self.mesh, self.batch_axes)
      assignment = _renumber(assignment, shard * x_td.shape[0], assignment.groups // shards)
      return dispatch(x_td, assignment, nnx.merge(graphdef, _vary(weights, self.batch_axes)))

    tokens = P(self.batch_axes)
    return jax.shard_map(
      body, mesh=self.mesh, in_specs=(tokens, tokens, P()), out_specs=tokens, check_vma=True
    )(x_td, assignment, weights)


@dataclasses.dataclass(frozen=True)
class AllGather:
  """Experts sharded; tokens are gathered over `expert_axis`, outputs reduced and scattered back.

  One dense collective each way and no counts to exchange: the default for expert axes up to 8. Rows that stay
  in their part of the batch are gathered over the expert axis only; rows that may refer to any token (expert
  choice over the whole batch) over all batch axes, the rows then being shared out between the data shards.

  Attributes:
    mesh: the mesh.
    batch_axes: mesh axes that the tokens are sharded over, the expert axis last.
    expert_axis: mesh axis that the experts are sharded over.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]
  expert_axis: str = 'expert'

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> Array:
    if self.batch_axes[-1] != self.expert_axis:
      raise ValueError(f'batch_axes={self.batch_axes}: the last one must be {self.expert_axis!r}')
    data_axes = self.batch_axes[:-1]
    data_shards = math.prod(self.mesh.shape[a] for a in data_axes)
    expert_shards = self.mesh.shape[self.expert_axis]
    _check_divides('tokens', x_td.shape[0], self.batch_axes, data_shards * expert_shards)
    _check_divides('num_experts', experts.num_experts, (self.expert_axis,), expert_shards)
    aligned = assignment.groups % data_shards == 0
    graphdef, weights = nnx.split(experts)

    def body(x_td, assignment, weights):
      axes = (self.expert_axis,) if aligned else self.batch_axes
      gathered_td = jax.lax.all_gather(x_td, axes, tiled=True)
      data_shard = _linear_index(self.mesh, data_axes)
      if aligned:
        assignment = _renumber(
          assignment, data_shard * gathered_td.shape[0], assignment.groups // data_shards
        )
      else:
        assignment = _share_out(assignment, data_shard, data_shards)
      local = experts.num_experts // expert_shards
      first = jax.lax.axis_index(self.expert_axis) * local
      assignment = _own_experts(assignment, first, local)
      y_td = dispatch(gathered_td, assignment, nnx.merge(graphdef, _vary(weights, data_axes)))
      return jax.lax.psum_scatter(y_td, axes, scatter_dimension=0, tiled=True)

    rows = P(data_axes) if aligned and data_axes else P()
    return jax.shard_map(
      body,
      mesh=self.mesh,
      in_specs=(P(self.batch_axes), rows, P(self.expert_axis)),
      out_specs=P(self.batch_axes),
      check_vma=True,
    )(x_td, assignment, weights)


def _linear_index(mesh: Mesh, axes: tuple[str, ...]) -> Array | int:
  """Index of this device along several mesh axes, the first one slowest."""
  index = 0
  for axis in axes:
    index = index * mesh.shape[axis] + jax.lax.axis_index(axis)
  return index


def _vary(weights, axes: tuple[str, ...]):
  """Marks weights that `axes` share as varying, so that their gradients are summed over `axes`."""
  if not axes:
    return weights
  return jax.tree.map(lambda w: jax.lax.pcast(w, axes, to='varying'), weights)


def _renumber(assignment: Assignment, first_token, groups: int) -> Assignment:
  """Global token indices -> indices into this shard's tokens."""
  return dataclasses.replace(assignment, token=assignment.token - first_token, groups=groups)


def _share_out(assignment: Assignment, shard, shards: int) -> Assignment:
  """Drops all rows but every `shards`-th: each data shard works on its share."""
  mine_r = jnp.arange(assignment.token.size, dtype=jnp.int32) % shards == shard
  return _keep(dataclasses.replace(assignment, groups=1), mine_r)


def _own_experts(assignment: Assignment, first, local: int) -> Assignment:
  """Drops the rows of other devices' experts and renumbers the own ones from 0."""
  own_r = (assignment.expert >= first) & (assignment.expert < first + local)
  own = _keep(assignment, own_r)
  return dataclasses.replace(
    own, expert=jnp.where(own_r, assignment.expert - first, local), num_experts=local
  )


def _keep(assignment: Assignment, keep_r: Array) -> Assignment:
  return dataclasses.replace(
    assignment,
    expert=jnp.where(keep_r, assignment.expert, assignment.num_experts),
    weight=jnp.where(keep_r, assignment.weight, 0),
  )


def _check_divides(what: str, size: int, axes: tuple[str, ...], shards: int) -> None:
  if size % shards:
    raise ValueError(f'{what}={size} does not divide over mesh axes {",".join(axes)}={shards}')
