"""Controllers: `(state, stats) -> state`, applied once a step, after it, outside the optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def balance_bias(
  bias_e: Float[Array, '*batch E'], chosen_e: Float[Array, '*batch E'], rate: float
) -> Float[Array, '*batch E']:
  """Loss-free balancing: `b_e + rate * sign(mean(c) - c_e)`.

  Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts", algorithm 1.

  Args:
    bias_e: the bias that moves the selection; a leading layer axis is welcome.
    chosen_e: rows that wanted each expert, before any drop, summed over the mesh and over all microbatches.
    rate: gamma, 1e-3 in the paper; 0 freezes the bias.
  """
  step = jnp.sign(chosen_e.mean(-1, keepdims=True) - chosen_e)
  return bias_e + jnp.asarray(rate, bias_e.dtype) * step.astype(bias_e.dtype)


def balance_biases(
  routing: Any, chosen_le: Float[Array, 'L E'] | Sequence[Array], rate: float
) -> Any:
  """`balance_bias` for every router of a model.

  Args:
    routing: pure dict of the model's router state; its leaves named 'bias' are `[repeats, E]`, one for each mixture in
      the repeated unit of a segment (moejax/transformer/stack.py). Others, such as a frozen kernel, stay as they are.
    chosen_le: as in `balance_bias`, in layer order; `[E]` of each layer where they have other numbers of experts.
    rate: see `balance_bias`.
  """
  found, structure = jax.tree_util.tree_flatten_with_path(routing)
  leaves = [leaf for _, leaf in found]
  segments: dict[str, list[int]] = {}  # places of the biases of every stacked segment
  for place, (path, _) in enumerate(found):
    names = [str(key.key) for key in path]
    if names[-1] == 'bias':
      segments.setdefault(names[names.index('segments') + 1], []).append(place)
  first = 0
  for places in segments.values():
    # the blocks of a unit take turns: layers first, first + size, ... are the first block's
    size, repeats = len(places), leaves[places[0]].shape[0]
    stop = first + repeats * size
    for i, place in enumerate(places):
      chosen_re = jnp.stack([*chosen_le[first + i : stop : size]])
      leaves[place] = balance_bias(leaves[place], chosen_re, rate)
    first = stop
  return jax.tree.unflatten(structure, leaves)
