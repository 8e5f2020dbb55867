"""Exchanges: where rows travel between devices. Values `(x_td, assignment, experts, dispatch) -> (y_td, lost_r)`.

Routing happens before, on global arrays, so an exchange never changes what is computed, only where; what it has no room
for it tells, row by row. All mesh exchanges run under `jax.shard_map` with `check_vma=True`: a value that is claimed to
be equal on all devices and is not does not compile.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from moejax.option_types import check_types

from .all_gather import AllGather as AllGather
from .all_to_all import AllToAll as AllToAll
from .bilevel import Bilevel as Bilevel
from .fallback import WithFallback as WithFallback
from .layout import Exchange as Exchange
from .layout import Layout as Layout
from .local import Local as Local
from .ragged import RaggedAllToAll as RaggedAllToAll
from .single import single as single
from .sparse_fsdp import SparseFSDP as SparseFSDP


def ragged_fallback(
  mesh: Mesh, batch_axes: tuple[str, ...], *, buffer_factor: float | int = 1.5, chunks: int = 1
) -> WithFallback:
  """A small ragged buffer; what it has no room for is gathered instead."""
  first = RaggedAllToAll(mesh, batch_axes, buffer_factor=buffer_factor, chunks=chunks)
  return WithFallback(first, AllGather(mesh, batch_axes))


EXCHANGES: dict[str, Callable[..., Exchange]] = {
  'all_gather': AllGather,
  'all_to_all': AllToAll,
  'bilevel': Bilevel,
  'local': Local,
  'ragged_all_to_all': RaggedAllToAll,
  'ragged_fallback': ragged_fallback,
  'sparse_fsdp': SparseFSDP,
}
"""Short name -> `make(mesh, batch_axes, **options)`."""


def make_exchange(
  name: str, mesh: Mesh, batch_axes: tuple[str, ...], options: Mapping[str, Any] | None = None
) -> Exchange:
  """The exchange of this short name.

  Args:
    name: a key of `EXCHANGES`.
    mesh: the mesh.
    batch_axes: mesh axes that tokens are sharded over, the expert axis last.
    options: of that exchange.

  Raises:
    ValueError: an unknown name or option, or a value out of its range.
  """
  options = dict(options or {})
  check_exchange(name, options)
  return EXCHANGES[name](mesh, batch_axes, **options)


def check_exchange(name: str, options: Mapping[str, Any]) -> None:
  """Raises ValueError for an unknown exchange, an option that it does not take or a value of another type."""
  if name not in EXCHANGES:
    raise ValueError(f'exchange={name!r}: accepted are {", ".join(map(repr, EXCHANGES))}')
  accepted = exchange_options(name)
  for key in options:
    if key not in accepted:
      text = ', '.join(map(repr, accepted)) or 'none'
      raise ValueError(f'exchange={name!r} has no option {key!r}: accepted are {text}')
  check_types(f'exchange={name!r}', EXCHANGES[name], options)


def exchange_options(name: str) -> tuple[str, ...]:
  """The options that an exchange takes."""
  return _OPTIONS[name]


_OPTIONS: dict[str, tuple[str, ...]] = {
  'all_gather': (),
  'all_to_all': ('capacity_factor', 'chunks'),
  'bilevel': ('nodes', 'capacity_factor', 'chunks'),
  'local': (),
  'ragged_all_to_all': ('buffer_factor', 'chunks', 'kernel'),
  'ragged_fallback': ('buffer_factor', 'chunks'),
  'sparse_fsdp': ('hot', 'capacity_factor', 'chunks'),
}
