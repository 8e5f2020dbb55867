"""The records that flow through a layer: context -> scores -> assignment (or plan) -> stats -> aux.

All are frozen dataclasses registered as pytrees, so they cross `jit`, `vmap`, `scan` and `shard_map`.
Axis letters: moejax/axes.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array

STATIC = {'static': True}  # a field that is part of the type, not of the data


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What a router may look at besides `x`. Absent fields are None.

  Attributes:
    mask: bool `[B, S]`, True for real tokens; padding is neither routed nor counted.
    token_ids: int `[B, S]`.
    positions: int `[B, S]`.
    previous_ids: int `[B, S]`, the id before each token in its document, -1 where there is none, of tokens that were
      taken out of their sequence; None where `token_ids` is whole and says it (`moejax.routers.router.previous_ids`).
    rng: a PRNG key for noise and jitter.
    progress: float32 scalar, fraction of the training steps done, for what changes over training (temperatures, k);
      None outside of training, which counts as 1.
    task: int `[B]`, the task, language or family that a sequence is of.
    time: float `[B]`, the step of a diffusion, from 0 (clean) to 1.
    domain: float `[B, W]`, an embedding of the whole sequence: domain, accent, speaker; `[B, S, W]` of its positions.
    text: float `[B, N, W]`, embeddings of N text tokens that an image is made after.
    maps: float `[B, N, S]`, how much each text token attends to each position of the image.
    state: name -> `[B, S, ...]` or scalar, what routers of the layers below left, token by token
      (moejax/routers/rmoe.py); None before the first layer. A layer passes on what it does not know.
    shared: name -> arrays, what one module made for the routers of all layers before the first layer ran.
    train: whether noise, jitter and training capacities apply.
  """

  mask: Array | None = None
  token_ids: Array | None = None
  positions: Array | None = None
  previous_ids: Array | None = None
  rng: Array | None = None
  progress: Array | None = None
  task: Array | None = None
  time: Array | None = None
  domain: Array | None = None
  text: Array | None = None
  maps: Array | None = None
  state: dict[str, Array] | None = None
  shared: dict[str, Any] | None = None
  train: bool = dataclasses.field(default=False, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """What a router thinks of each (token, expert) pair; float32 or wider, all `[B, S, E]`.

  Of soft methods `select` and `gate` are the logits of the slots, `[B, S, E, P]`.

  Attributes:
    logits: clean router logits; the z-loss is made of these.
    select: what selection ranks (noise and balancing bias included).
    gate: what the weights of chosen experts are made of.
    probs: rows sum to one; what balance losses and entropies are made of.
    load: probability that the expert stays selected when its noise is drawn again; None without noise.
    nulls: the last so many experts do nothing and are all alike: their counts are averaged (AdaMoE).
    state: what the router leaves for the layer above, see `Context`; None of routers without a state.
    guidance: `[B, S]`, how far the router is from where it is told to send the token; None where nobody tells it.
    partition: `[B, S]`, log-partition function of the logits, where it is known already.
    clusters: experts stand in so many consecutive groups of equal size (devices, nodes, clusters).
  """

  logits: Array
  select: Array
  gate: Array
  probs: Array
  load: Array | None = None
  state: dict[str, Array] | None = None
  guidance: Array | None = None
  partition: Array | None = None
  nulls: int = dataclasses.field(default=0, metadata=STATIC)
  clusters: int = dataclasses.field(default=1, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Assignment:
  """R rows of (token, expert, weight): every sparse method, token choice and expert choice alike.

  Attributes:
    token: int32 `[R]`, index into the T flattened tokens.
    expert: int32 `[R]`; `num_experts` means that the row is dropped. Where a router knows more experts than
      the layer's bank holds, those past the bank cost nothing (moejax/moe/zero_computation.py) or do nothing.
    weight: float32 (or wider) `[R]`, the combine weight; zero where dropped.
    chosen: int32 `[R]`, the expert that was wanted before capacity; `num_experts` where none was: padding, and
      second choices that were given up.
    num_experts: E.
    groups: tokens and rows are cut in this many equal consecutive chunks, and the rows of a chunk refer
      only to the tokens of the same chunk. `groups == T` means token-major rows (row r is of token
      r // K), `groups == B` that no row leaves its sequence, 1 that rows may refer to any token.
  """

  token: Array
  expert: Array
  weight: Array
  chosen: Array
  num_experts: int = dataclasses.field(metadata=STATIC)
  groups: int = dataclasses.field(default=1, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftPlan:
  """Dense dispatch and combine tensors of the soft methods, both `[..., S, E, P]`.

  Slot inputs are `einsum('bsep,bsd->bepd', dispatch, x)`, outputs `einsum('bsep,bepd->bsd', combine, ...)`.

  Attributes:
    dispatch, combine: weight of a token in a slot's input, of a slot's output in a token.
    across: 0, or g: slots are not those of a sequence, but those of a position of g consecutive sequences.
  """

  dispatch: Array
  combine: Array
  across: int = dataclasses.field(default=0, metadata=STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStats:
  """Sums over real tokens: the stats of two batches add up to the stats of the joined batch.

  That is what makes balance losses exact under data parallelism and gradient accumulation: losses are
  functions of these sums (moejax/moe/losses.py), and sums do not mind how the batch was cut.

  Attributes:
    tokens: scalar, number of real tokens.
    chosen_e: `[E]`, rows that wanted the expert, before capacity.
    kept_e: `[E]`, rows that the expert worked on.
    prob_e: `[E]`, sum of `Scores.probs`.
    weight_e: `[E]`, sum of the combine weights.
    load_e: `[E]`, sum of `Scores.load`, or of the rows (no gradient) without noise.
    z: scalar, sum of squared log-partition functions of the logits.
    entropy: scalar, sum of the entropies of `Scores.probs`, in nats.
    sequence_balance: scalar, sum over sequences of its real tokens times its balance loss.
    unrouted: scalar, tokens that no expert worked on.
    lost: scalar, rows that an exchange between devices had no room for, none of which is in `kept_e`; None: no layer.
    sparsity: scalar, sum of the L1 norms of `Scores.probs`, each of unit L2 norm.
    cost_e: `[E]`, tokens times the relative cost of the expert; None: all cost the same.
    guidance: scalar, sum of `Scores.guidance`; None where there is none.
    home_g: `[G]`, tokens at home with each cluster, by the place of their sequence in the batch: sequence b of B with
      cluster `b G // B`, which is how a mesh lays both out, whatever its size. None of a single cluster.
    local_g: `[G]`, the sum of the probabilities that they give to the experts of that cluster. None likewise.
    clusters: G, as in `Scores`.
    part: what these are of: 'moe', 'attention' whose heads are experts, or 'depth', which tokens a block works on.

  E counts all experts that the router knows.
  """

  tokens: Array
  chosen_e: Array
  kept_e: Array
  prob_e: Array
  weight_e: Array
  load_e: Array
  z: Array
  entropy: Array
  sequence_balance: Array
  unrouted: Array
  sparsity: Array | None = None
  lost: Array | None = None
  cost_e: Array | None = None
  guidance: Array | None = None
  home_g: Array | None = None
  local_g: Array | None = None
  clusters: int = dataclasses.field(default=1, metadata=STATIC)
  part: str = dataclasses.field(default='moe', metadata=STATIC)


ModelStats = RoutingStats | tuple[RoutingStats, ...] | None
"""Of a whole model: the stats of all its routed layers stacked in layer order `[L, ...]`; where they are of unlike
layouts (other numbers of experts, other parts of a block) one record for each, in order of their first layers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Aux:
  """What a layer returns beside `y`.

  Attributes:
    losses: name -> scalar, coefficient already applied: add them to the training loss.
    metrics: name -> scalar or `[E]`.
    stats: the sums that both are made of.
    state: what the layer leaves for the one above, see `Context`; None of layers without a state.
  """

  losses: dict[str, Array]
  metrics: dict[str, Array]
  stats: RoutingStats
  state: dict[str, Array] | None = None


def wide_dtype(dtype) -> jnp.dtype:
  """float32 for narrower floats, the type itself for float32 and float64: what routers and losses run in."""
  dtype = jnp.dtype(dtype)
  return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def full_precision() -> contextlib.AbstractContextManager:
  """A context in which matrix products of float32 are that: accelerators would cut their inputs to fewer bits.

  Of 24 bits a GPU's usual product looks at 11 and a TPU's at 8, which is enough to change which experts are chosen.
  """
  return jax.default_matmul_precision('highest')
