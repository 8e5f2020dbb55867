"""A stack of blocks, stored stacked and run by `lax.scan`: the program does not grow with depth.

Layers of unlike kinds are cut into segments, each a unit of one or more blocks that repeats. Parameters of
a segment carry a leading axis of its repeats: the path `segments/0/blocks/1/ffn/up/weight` holds
`[L, D, F]`, the second block of the first segment's unit in each of its L repeats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, ModelStats, RoutingStats
from moejax.transformer.attention import Visible
from moejax.transformer.block import Block
from moejax.transformer.depth import SkippedBlock

AnyBlock = Block | SkippedBlock

# What the backward pass finds stored of each block. 'none': everything. 'full': the block's input, the rest
# is computed again. 'dots': also results of matrix products with weights.
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def plan_segments(kinds: Sequence[str]) -> tuple[tuple[tuple[str, ...], int], ...]:
  """`kinds` as (unit, repeats) pairs with the fewest blocks to compile, then the fewest segments.

  A periodic pattern is one segment of its smallest period, halves are two, 'every 2' of an odd depth is
  the repeated pair and one block more.
  """
  n = len(kinds)
  # first layer -> (blocks compiled, segments, plan) from there on
  plans: dict[int, tuple[int, int, tuple]] = {n: (0, 0, ())}
  for first in reversed(range(n)):
    options = []
    for size in range(1, n - first + 1):
      unit = tuple(kinds[first : first + size])
      stop = first + size
      while stop <= n and tuple(kinds[stop - size : stop]) == unit:
        blocks, segments, rest = plans[stop]
        options.append((size + blocks, 1 + segments, ((unit, (stop - first) // size), *rest)))
        stop += size
    plans[first] = min(options, key=lambda option: option[:2])
  return plans[0][2]


class Segment(nnx.Module):
  """`repeats` copies of a unit of blocks; every variable has a leading axis `[repeats, ...]`.

  Variables that are not parameters (a router's balancing bias) are stacked and sliced like parameters and
  only read: what a layer assigns to them in its call is lost.
  """

  def __init__(self, blocks: Sequence[AnyBlock], first: int, repeats: int, remat: str, unroll: int):
    self.blocks = nnx.List(blocks)  # variables already stacked
    self.first = first  # the number of its first layer
    self.repeats = repeats
    self.remat = remat
    self.unroll = unroll

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    context: Context,
    rotation: tuple[jax.Array, jax.Array] | None,
    visible: Visible | None,
  ) -> tuple[Float[Array, 'B S D'], list[RoutingStats], dict[str, jax.Array]]:
    """Output, the stats of the routed layers, each layout stacked in layer order `[L, ...]`, and the routing state.

    `context.state` holds all that `Stack.prepare` puts there.
    """
    graphs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

    def run_block(graph):
      def run(weights, x, state, layer):
        own = dataclasses.replace(context_of(layer, context), state=state)
        return nnx.merge(graph, weights)(x, own, rotation, visible)

      policy = REMAT[self.remat]
      return run if policy is None else jax.checkpoint(run, policy=policy, prevent_cse=False)

    def run_unit(carry, step):
      (x, state), (all_weights, repeat) = carry, step
      stats = []
      for index, (graph, weights) in enumerate(zip(graphs, all_weights, strict=True)):
        layer = self.first + repeat * len(graphs) + index
        x, block_stats, state = run_block(graph)(weights, x, state, layer)
        stats += block_stats
      return (x, state), stats

    steps = (states, jnp.arange(self.repeats, dtype=jnp.int32))
    carry = (x, context.state or {})
    (x, state), stats = jax.lax.scan(run_unit, carry, steps, unroll=min(self.unroll, self.repeats))
    return x, by_layout(stats, interleave), state


class Stack(nnx.Module):
  """Segments one after the other; made by `Stack.create` or, of blocks that exist, `Stack.of`.

  `shared` makes what the routers of all layers share: a module `(x, context, visible) -> dict` that runs before the
  first layer, and whose result is `context.shared` (moejax/routers/read_me.py).
  """

  def __init__(self, segments: Sequence[Segment], shared: nnx.Module | None = None):
    self.segments = nnx.List(segments)
    self.shared = shared

  @classmethod
  def create(
    cls,
    make_block: Callable[[str, nnx.Rngs], AnyBlock],
    kinds: Sequence[str],
    *,
    remat: str = 'none',
    unroll: int = 1,
    make_shared: Callable[[nnx.Rngs], nnx.Module] | None = None,
    rngs: nnx.Rngs,
  ) -> Stack:
    """A stack of fresh blocks of the given kinds, in order.

    Args:
      make_block: (kind, rngs) -> Block. Blocks of one kind differ in nothing but their variables' values.
      kinds: the kind of every layer.
      remat: a key of REMAT.
      unroll: repeats in one turn of the loop. All of them: no loop, and no copies in and out of stacked arrays.
      make_shared: makes `shared`, see `Stack`.

    Raises:
      ValueError: if remat is not a key of REMAT or there is no layer.
    """
    check(kinds, remat)
    segments, first = [], 0
    for unit, repeats in plan_segments(kinds):
      keys = jax.random.split(rngs.params(), repeats)
      graph, state = jax.vmap(lambda key, unit=unit: make_unit(make_block, unit, key))(keys)
      segments.append(Segment(nnx.merge(graph, state), first, repeats, remat, unroll))
      first += repeats * len(unit)
    return cls(segments, make_shared(rngs) if make_shared else None)

  @classmethod
  def of(
    cls,
    blocks: Sequence[AnyBlock],
    *,
    remat: str = 'none',
    unroll: int = 1,
    shared: nnx.Module | None = None,
  ) -> Stack:
    """A stack of these blocks: what surgery does after changing layers of `unstack`.

    Layers stack where their variables agree in names, shapes and dtypes and their settings are equal; others
    become segments of their own.
    """
    graphs, states = zip(*(nnx.split(block) for block in blocks), strict=True)
    layouts = [jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), state) for state in states]
    kinds = [f'{graph} {layout}' for graph, layout in zip(graphs, layouts, strict=True)]
    check(kinds, remat)
    segments, first = [], 0
    for unit, repeats in plan_segments(kinds):
      stacked = []
      for index in range(first, first + len(unit)):
        alike = states[index : first + repeats * len(unit) : len(unit)]
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)
        stacked.append(nnx.merge(graphs[index], state))
      segments.append(Segment(stacked, first, repeats, remat, unroll))
      first += repeats * len(unit)
    return cls(segments, shared)

  def __call__(
    self,
    x: Float[Array, 'B S D'],
    context: Context,
    rotation: tuple[jax.Array, jax.Array] | None = None,
    visible: Visible | None = None,
  ) -> tuple[Float[Array, 'B S D'], ModelStats]:
    """Output and the stats of all routed layers, see `ModelStats`."""
    parts: list[RoutingStats] = []
    context = self.prepare(x, context, visible)
    for segment in self.segments:
      x, stats, state = segment(x, context, rotation, visible)
      context = dataclasses.replace(context, state=state)
      parts += stats
    found = by_layout(parts, lambda alike: jax.tree.map(lambda *a: jnp.concatenate(a), *alike))
    return x, (tuple(found) if len(found) > 1 else found[0] if found else None)

  def prepare(
    self, x: Float[Array, 'B S D'], context: Context, visible: Visible | None = None
  ) -> Context:
    """The context of the first layer: with what all routers share, and the state of nothing below.

    Raises:
      ValueError: two layers whose states have one name and different shapes.
    """
    if self.shared is not None:
      context = dataclasses.replace(context, shared=self.shared(x, context, visible))
    state: dict[str, jax.Array] = {}
    for segment in self.segments:
      for block in segment.blocks:
        for name, value in block.initial_state(x).items():
          if state.setdefault(name, value).shape != value.shape:
            raise ValueError(
              f'state {name!r} of shapes {state[name].shape} and {value.shape} in one stack: accepted are layers whose '
              'states are alike'
            )
    return dataclasses.replace(context, state=state | (context.state or {}))

  def unstack(self) -> list[AnyBlock]:
    """Every layer as a block of its own, with copies of its variables."""
    blocks = []
    for segment in self.segments:
      for repeat in range(segment.repeats):
        for block in segment.blocks:
          graph, state = nnx.split(block)
          blocks.append(nnx.merge(graph, jax.tree.map(lambda leaf, r=repeat: leaf[r], state)))
    return blocks


def check(kinds: Sequence[str], remat: str) -> None:
  if remat not in REMAT:
    raise ValueError(f'remat={remat!r} is not one of {sorted(REMAT)}')
  if not kinds:
    raise ValueError('num_layers=0: a stack has at least one layer')


def make_unit(make_block, unit: Sequence[str], key: jax.Array):
  """(graph, state) of one block of each kind in `unit`; `vmap` over keys stacks the state."""
  rngs = nnx.Rngs(key)
  return nnx.split(nnx.List([make_block(kind, rngs) for kind in unit]))


def context_of(layer: jax.Array | int, context: Context) -> Context:
  """`context` with the layer's own key."""
  if context.rng is None:
    return context
  return dataclasses.replace(context, rng=jax.random.fold_in(context.rng, layer))


def by_layout(
  stats: Sequence[RoutingStats], join: Callable[[list[RoutingStats]], RoutingStats]
) -> list[RoutingStats]:
  """Stats `[L, ...]` that agree in all but L joined, in order of the first of each."""
  alike: dict[Any, list[RoutingStats]] = {}
  for one in stats:
    leaves, structure = jax.tree.flatten(one)
    alike.setdefault((structure, tuple(leaf.shape[1:] for leaf in leaves)), []).append(one)
  return [join(group) for group in alike.values()]


def interleave(stats: list[RoutingStats]) -> RoutingStats:
  """Stats of the n mixtures of a unit, each stacked over repeats `[L, ...]`, in layer order `[L * n, ...]`."""
  return jax.tree.map(lambda *a: jnp.stack(a, axis=1).reshape(-1, *a[0].shape[1:]), *stats)
