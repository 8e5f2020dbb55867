"""What exchanges share: how tokens, rows and weights lie on the mesh, and the function that runs on each device.

Tokens are sharded over the batch axes, experts over `expert`, their model width over `fsdp`, their hidden width over
`tensor`. Over `tensor` tokens are cut by model width, so that the ranks of one expert never send the same numbers
(Singh et al. 2023, "A hybrid tensor-expert-data parallelism approach", drop duplicates before the all-to-all and gather
after it); they are put together where the experts work, and the partial sums of the outputs are scattered again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from moejax.arrays import Assignment, wide_dtype
from moejax.moe.dispatch import Dispatch
from moejax.moe.exchange.rows import Rows, local_rows
from moejax.moe.experts import Experts

_GATHERED = 'gathered experts'


@runtime_checkable
class Exchange(Protocol):
  """Where rows and slots are worked on."""

  def __call__(
    self, x_td: Array, assignment: Assignment, experts: Experts, dispatch: Dispatch
  ) -> tuple[Array, Array | None]:
    """The weighted outputs, and which rows found no room on their way; None where all do."""

  def slots(self, slots_bepd: Array, experts: Experts) -> Array:
    """Outputs of the slots of soft routers, which are all that travels."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """Names of the mesh's axes.

  Attributes:
    mesh: the mesh. Axes that it lacks count as one device.
    batch_axes: axes that tokens are sharded over, the expert axis last.
    expert_axis, fsdp_axis, tensor_axis: axes of the experts, of their model width and of their hidden width.
  """

  mesh: Mesh
  batch_axes: tuple[str, ...]
  expert_axis: str = dataclasses.field(default='expert', kw_only=True)
  fsdp_axis: str = dataclasses.field(default='fsdp', kw_only=True)
  tensor_axis: str = dataclasses.field(default='tensor', kw_only=True)

  def __post_init__(self):
    if not self.batch_axes or self.batch_axes[-1] != self.expert_axis:
      raise ValueError(f'batch_axes={self.batch_axes}: the last one must be {self.expert_axis!r}')
    for axis in self.batch_axes:
      if axis not in self.mesh.shape:
        names = ', '.join(map(str, self.mesh.shape))
        raise ValueError(
          f'batch_axes={self.batch_axes}: the mesh has no axis {axis!r}, only {names}'
        )
    kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
    for axis, kind in kinds.items():
      if kind == AxisType.Explicit:
        raise ValueError(
          f'mesh axis {axis!r} is of explicit sharding: accepted are axes of type AxisType.Auto'
        )
    if self.tensor_axis in self.batch_axes:
      raise ValueError(
        f'batch_axes={self.batch_axes}: tokens are not sharded over {self.tensor_axis!r}'
      )

  def size(self, axis: str) -> int:
    """Devices along an axis."""
    return self.mesh.shape.get(axis, 1)

  @property
  def shards(self) -> int:
    """Parts that the tokens are cut in."""
    return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

  @property
  def owners(self) -> int:
    """Parts that the experts are cut in."""
    return self.mesh.shape[self.expert_axis]

  @property
  def width(self) -> str | None:
    """The axis that tokens are cut by model width over, and experts by hidden width, if there is one."""
    return self.tensor_axis if self.size(self.tensor_axis) > 1 else None

  def weight_spec(self, name: str) -> P:
    """Where a weight of the bank lies."""
    fsdp = self.fsdp_axis if self.fsdp_axis in self.mesh.shape else None
    if name == 'w_down':
      return P(self.expert_axis, self.width, fsdp)
    return P(self.expert_axis, fsdp, self.width)

  def index(self, axes: tuple[str, ...]) -> Array | int:
    """Of this device along several axes, the first one slowest."""
    index: Array | int = 0
    for axis in axes:
      index = index * self.mesh.shape[axis] + jax.lax.axis_index(axis)
    return index


@dataclasses.dataclass(frozen=True)
class Bank:
  """The experts of this device, inside of the function that runs on each.

  Attributes:
    experts: with the weights of this device, whole in their model width.
    dispatch: of the layer.
    width: axis that tokens are cut by model width over, or None.
  """

  experts: Experts
  dispatch: Dispatch | None
  width: str | None

  def __call__(self, x_td: Array, assignment: Assignment) -> Array:
    """The weighted outputs of rows of this device's experts."""
    return self._whole(lambda x_td: self.dispatch(x_td, assignment, self.experts), x_td)

  def each(self, x_ud: Array, expert_u: Array) -> Array:
    """The output of every row, given its expert; `num_experts` for places that hold none."""
    num_rows, num_experts = x_ud.shape[0], self.experts.num_experts
    rows = Assignment(
      token=jnp.arange(num_rows, dtype=jnp.int32),
      expert=expert_u,
      weight=(expert_u < num_experts).astype(wide_dtype(x_ud.dtype)),
      chosen=expert_u,
      num_experts=num_experts,
      groups=num_rows,
    )
    return self(x_ud, rows)

  def slots(self, slots_bepd: Array) -> Array:
    """Every expert on its own slots."""
    return self._whole(self.experts.slots, slots_bepd)

  def gathered(self, index_e: Array, axis: str) -> Bank:
    """A bank of copies of these experts of all devices along the axis; for bodies that say `body_gathers`."""
    graphdef, weights = nnx.split(self.experts)
    gather = lambda w: jax.lax.all_gather(w[index_e], axis, tiled=True)
    copies = jax.tree.map(lambda w: checkpoint_name(gather(w), _GATHERED), weights)
    return dataclasses.replace(self, experts=nnx.merge(graphdef, copies))

  def _whole(self, apply: Callable[[Array], Array], x: Array) -> Array:
    """`apply` on the whole model width; its result is a sum over the devices that share the hidden width."""
    if self.width is None:
      return apply(x)
    last = x.ndim - 1
    y = apply(jax.lax.all_gather(x, self.width, axis=last, tiled=True))
    return jax.lax.psum_scatter(y, self.width, scatter_dimension=last, tiled=True)


Body = Callable[[Array, Rows, Bank], tuple[Array, Array | None]]


def exchange_rows(
  layout: Layout,
  x_td: Array,
  assignment: Assignment,
  experts: Experts,
  dispatch: Dispatch,
  body: Body,
  *,
  gather_experts: bool = False,
  body_gathers: bool = False,
) -> tuple[Array, Array | None]:
  """`body(x_td, rows, bank) -> (y_td, lost_r)` on every device.

  Rows that stay in their part of the batch lie beside their tokens. Others (an expert's choice among all tokens) are
  known to all devices, and each takes those of its own tokens. `gather_experts`: the bank has all experts;
  `body_gathers`: the body asks it for copies of some. Either are gathered again in the backward pass.

  Raises:
    ValueError: tokens, experts or widths that do not divide over their mesh axes.
  """
  _check(layout, x_td, experts)
  aligned = assignment.groups % layout.shards == 0
  tokens, rows = P(layout.batch_axes, layout.width), P(layout.batch_axes) if aligned else P()

  def on_device(x_td, assignment, bank):
    mine = local_rows(assignment, x_td.shape[0], layout.index(layout.batch_axes), layout.shards)
    y_td, lost_r = body(x_td, mine, bank)
    if lost_r is not None and not aligned:
      lost_r = jax.lax.psum(lost_r.astype(jnp.int32), layout.batch_axes) > 0
    return y_td, lost_r

  specs = (tokens, rows)
  run = _on_mesh(
    layout, on_device, dispatch, experts, specs, specs, gather_experts, body_gathers=body_gathers
  )
  return run(x_td.astype(experts.dtype), assignment)


def exchange_slots(
  layout: Layout, slots_bepd: Array, experts: Experts, *, gather_experts: bool = False
) -> Array:
  """Slots to their experts and back: `[B / n, E, P, D]` of a device becomes `[B, E / n, P, D]`.

  Traffic does not depend on the number of tokens. Sequences that do not divide over the devices are padded with zeros.
  """
  _check(layout, None, experts)
  batch = slots_bepd.shape[0]
  padding = -batch % layout.shards
  slots_bepd = jnp.pad(slots_bepd, ((0, padding), (0, 0), (0, 0), (0, 0)))
  spec = P(layout.batch_axes, None, None, layout.width)

  def on_device(slots_bepd, bank):
    if gather_experts or layout.owners == 1:
      return bank.slots(slots_bepd)
    axis = layout.expert_axis
    slots_bepd = jax.lax.all_to_all(slots_bepd, axis, split_axis=1, concat_axis=0, tiled=True)
    y_bepd = bank.slots(slots_bepd)
    return jax.lax.all_to_all(y_bepd, axis, split_axis=0, concat_axis=1, tiled=True)

  run = _on_mesh(layout, on_device, None, experts, (spec,), spec, gather_experts)
  return run(slots_bepd.astype(experts.dtype))[:batch]


def _on_mesh(
  layout, on_device, dispatch, experts, in_specs, out_specs, gather_experts, *, body_gathers=False
):
  """`jax.shard_map` of `on_device(*arrays, bank)`.

  Weights are gathered over `fsdp` in here and gathered again in the backward pass, not kept: what is kept between the
  two passes are the shards.
  """
  graphdef, weights = nnx.split(experts)
  specs = jax.tree_util.tree_map_with_path(
    lambda path, _: layout.weight_spec(jax.tree_util.keystr(path[:1], simple=True)), weights
  )

  def with_weights(weights, *arrays):
    gathered = jax.tree.map(
      lambda w, spec: _gather(w.astype(experts.dtype), spec, layout, gather_experts), weights, specs
    )
    return on_device(*arrays, Bank(nnx.merge(graphdef, gathered), dispatch, layout.width))

  policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
  if layout.size(layout.fsdp_axis) > 1 or (gather_experts and layout.owners > 1) or body_gathers:
    with_weights = jax.checkpoint(with_weights, policy=policy)
  run = jax.shard_map(
    with_weights,
    mesh=layout.mesh,
    in_specs=(specs, *in_specs),
    out_specs=out_specs,
    check_vma=True,
  )
  return lambda *arrays: run(weights, *arrays)


def _gather(w: Array, spec: P, layout: Layout, gather_experts: bool) -> Array:
  """A weight of this device, whole in what is sharded for memory alone; its gradient is summed over the batch."""
  axes = (layout.fsdp_axis, layout.expert_axis) if gather_experts else (layout.fsdp_axis,)
  for dimension, axis in enumerate(spec):
    if axis in axes and layout.size(axis) > 1:
      w = jax.lax.all_gather(w, axis, axis=dimension, tiled=True)
  same = tuple(axis for axis in layout.batch_axes if axis not in spec)
  w = jax.lax.pcast(w, same, to='varying') if same else w
  return checkpoint_name(w, _GATHERED)


def _check(layout: Layout, x_td: Any, experts: Experts) -> None:
  d_model, d_ff = experts.w_up.shape[1:]
  if x_td is not None:
    check_divides('tokens', x_td.shape[0], layout.batch_axes, layout.shards)
  check_divides('num_experts', experts.num_experts, (layout.expert_axis,), layout.owners)
  for axis in (layout.fsdp_axis, layout.tensor_axis):
    check_divides('d_model', d_model, (axis,), layout.size(axis))
  check_divides('d_ff', d_ff, (layout.tensor_axis,), layout.size(layout.tensor_axis))


def check_divides(what: str, size: int, axes: tuple[str, ...], shards: int) -> None:
  """Refuses sizes that cannot be cut evenly.

  Raises:
    ValueError: with the size and the axes.
  """
  if size % shards:
    raise ValueError(f'{what}={size} does not divide over mesh axes {",".join(axes)}={shards}')
