"""A placement made real: experts and the columns of their router in another order, the function as it was."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from moejax.moe.layer import MoE
from moejax.placement.affinity import Placement
from moejax.routers.affinity import TokenAffinity
from moejax.routers.scorers import LinearScorer
from moejax.routers.top_k import TopKAssign
from moejax.transformer.depth import SkippedBlock
from moejax.transformer.stack import Stack


def order_of(placement: Placement) -> np.ndarray:
  """`[L, E]`: the expert that stands at each place once those of a device are neighbours, in the order of devices."""
  return np.argsort(placement, axis=1, kind='stable')


def permute_experts(stack: Stack, order: np.ndarray) -> Stack:
  """A stack whose mixture l holds expert `order[l, e]` at place e; the function does not change.

  Args:
    stack: of a model; it stays as it is.
    order: int `[L, E]`, a permutation for every mixture, in the order of layers.

  Raises:
    ValueError: a router that knows more of an expert's place than a column of its kernel, experts of unlike widths or
      capacities, or an order that is none.
  """
  graph, state = nnx.split(stack)
  stack = nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
  first = 0
  for segment in stack.segments:
    blocks = [b.block if isinstance(b, SkippedBlock) else b for b in segment.blocks]
    mixtures = [block.moe for block in blocks if block.moe is not None]
    for index, layer in enumerate(mixtures):
      if not isinstance(layer, MoE):
        raise ValueError(f'experts of {type(layer).__name__} cannot change places: accepted is MoE')
      last = first + segment.repeats * len(mixtures)
      _reorder(layer, np.asarray(order)[first + index : last : len(mixtures)])
    first += segment.repeats * len(mixtures)
  if first != len(order):
    raise ValueError(f'order of {len(order)} layers for {first} mixtures')
  return stack


def _reorder(layer: MoE, order: np.ndarray) -> None:
  """In place; variables carry a leading axis of layers, and so does `order`."""
  router = layer.router
  scorer = router.scorer if isinstance(router.scorer, LinearScorer) else None
  assign = router.assign if isinstance(router.affinity, TokenAffinity) else None
  if scorer is None or not isinstance(assign, TopKAssign) or layer.zero is not None:
    raise ValueError(
      'experts of this router cannot change places: accepted are linear scorers with top-k over all experts'
    )
  if layer.parts is not None or (
    assign.capacity is not None and assign.capacity.shares is not None
  ):
    raise ValueError(
      'experts of unlike widths or capacities cannot change places: accepted are equal ones'
    )
  kernel = scorer.kernel  # [L, D, E]
  experts = kernel.shape[-1]
  if (np.sort(order, axis=1) != np.arange(experts)).any():
    raise ValueError(f'order is no permutation of the {experts} experts')
  weights = layer.experts
  for weight in (weights.w_gate, weights.w_up, weights.w_down):
    if weight is not None:  # [L, E, ...]
      weight[...] = weight[...][np.arange(len(order))[:, None], order]
  kernel[...] = np.take_along_axis(kernel[...], order[:, None, :], axis=2)
  if router.bias is not None:
    router.bias[...] = np.take_along_axis(router.bias[...], order, axis=1)
