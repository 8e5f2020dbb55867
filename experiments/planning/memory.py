"""Bytes of a device in one training step, by group of tensors: the analytic model.

State is exact. What a step needs beside it is estimated from the shapes of the largest arrays that live together, from
above: no program compiled for TPUs lived with more (experiments/results/plans has the errors).
"""

from __future__ import annotations

import dataclasses

from experiments.planning.exchanges import Rows, hops, worked_on
from experiments.planning.rows import copies
from experiments.planning.workload import Layout, Workload
from experiments.settings import OptimSettings

GROUPS = ('parameters', 'optimizer', 'gradients', 'activations', 'buffers')
"""Groups of tensors: float32 weights, the optimizer's moments, sums of gradients, inputs of layers that the backward
pass starts from, and what the largest layer works with."""

SPARE = 1.2
"""What lives at once over what does by the shapes: the least that covers every compiled program."""

Memory = dict[str, float]


def memory(work: Workload, layout: Layout) -> Memory:
  """Bytes by group, of one device."""
  state = sum(
    elements / tensor.shards(layout.sizes) * 4
    for tensor, elements in work.classes
    if tensor.trained
  )
  biases = sum(elements * 4 for tensor, elements in work.classes if not tensor.trained)
  return {
    'parameters': state + biases,
    'optimizer': moments(work.settings.optim) * state,
    'gradients': state * (2 if layout.microbatches > 1 else 1),  # the sum, and what is added to it
    'activations': activations(work, layout),
    'buffers': buffers(work, layout),
  }


def moments(optim: OptimSettings) -> float:
  """Copies of the float32 weights that the optimizer holds: two of Adam's; of Adafactor's first moment half a one, and
  its factors are as good as nothing."""
  if optim.name == 'adamw':
    return 2.0
  return 0.5 if optim.b1 else 0.0


def activations(work: Workload, layout: Layout) -> float:
  """What the backward pass finds stored of a microbatch."""
  model, tokens = work.settings.model, work.tokens(layout)
  # beside the axis `tensor`, XLA cuts the vectors of tokens by their width
  inputs = tokens * model.d_model * work.width / layout.tensor
  if model.remat == 'full':
    return model.num_layers * inputs
  heads = tokens * work.query_heads * work.score_width * work.width
  found: float = sum(work.shares) * (inputs * 8 + heads)
  if model.remat == 'none':
    found += sum(attention(work, layout, share) for share in work.shares) / 2
    found += sum(experts(work, layout, *mixture) for mixture in work.mixtures) / 2
  return found


def buffers(work: Workload, layout: Layout) -> float:
  """The largest phase of the step, the embedding's gradient and the weights in the type of the computation."""
  copies = sum(
    elements / tensor.shards(layout.sizes) * work.width
    for tensor, elements in work.classes
    if tensor.trained
  )
  largest = max(layer(work, layout), logits(work, layout))
  return SPARE * (largest + embedding(work, layout) + copies)


def layer(work: Workload, layout: Layout) -> float:
  """The backward pass of the layer that needs most: its attention or its experts, and its gathered weights."""
  mixtures = work.mixtures
  largest = max((count for _, count in mixtures), default=0) / max(1, sum(c for _, c in mixtures))
  gathered = copies(work, layout) / max(1, len(mixtures))
  for tensor, elements in work.classes:
    part = largest if tensor.group == 'experts' else 1 / work.settings.model.num_layers
    if tensor.group in ('experts', 'heads', 'dense') and tensor.trained:
      others = tuple(axis for axis in layout.sizes if axis != 'fsdp')
      gathered += elements * part / tensor.shards(layout.sizes, others)
  phases = [attention(work, layout, share) for share in {*work.shares}]
  for way in (experts, fallback):
    phases += [way(work, layout, *mixture) for mixture in {*mixtures}]
  return gathered * 2 * work.width + max(phases)  # with its gradient


def attention(work: Workload, layout: Layout, share: float = 1.0) -> float:
  """Scores of all heads, their exponentials and the gradients of both; queries, keys and values; of these tokens."""
  length = work.settings.data.sequence_length
  tokens = work.tokens(layout) * share
  scores = tokens * length * share * work.query_heads / layout.tensor
  vectors = tokens * work.query_heads * work.score_width / layout.tensor
  found = scores * (2 * 4 + work.width) + vectors * 3 * (4 + work.width)
  return found + heads(work, layout, share)


def heads(work: Workload, layout: Layout, share: float = 1.0) -> float:
  """Rows of heads that are experts in the backward pass of the wider of their projections."""
  if not work.head_rows:
    return 0.0
  model = work.settings.model
  own = model.heads.num_experts * (model.num_heads if model.attention == 'switch_head' else 1)
  per_row = model.d_model * (2 * work.width + 4) + model.head_dim * (work.width + 4)
  weights = model.d_model * model.head_dim * (work.width + 4)
  return _in_blocks(work, work.tokens(layout) * work.head_rows * share, own, per_row, weights)


def experts(work: Workload, layout: Layout, share: float = 1.0, num_experts: int = 0) -> float:
  """Rows of the experts in the backward pass, and of devices that they pass on their way.

  Args:
    work, layout: what is planned.
    share: part of the tokens that the layer works on.
    num_experts: of the layer; 0 for the most that one has.
  """
  if not work.mixtures:
    return 0.0
  row = work.settings.model.d_model * work.width / layout.tensor
  onward = sum(hop.places for hop in hops(work, layout)[:-1]) * 2 * row * share
  found = worked_on(work, layout, num_experts)
  return onward + sum(_bank(work, layout, rows, share) for rows in found)


def fallback(work: Workload, layout: Layout, share: float = 1.0, num_experts: int = 0) -> float:
  """What the second way of rows takes: the program has it, whether a step goes it or not."""
  if layout.exchange != 'ragged_fallback':
    return 0.0
  second = dataclasses.replace(layout, exchange='all_gather', options={})
  return experts(work, second, share, num_experts)


def _bank(work: Workload, layout: Layout, rows: Rows, share: float) -> float:
  """Rows of one set of experts in the backward pass; as padded blocks also a copy of the weights for each block."""
  model = work.settings.model
  d_ff = model.moe.d_ff // model.moe.granularity / layout.tensor
  arrays = 3 if model.gated else 2
  per_row: float = model.d_model * (2 * work.width + 4) + d_ff * (arrays * 4 + arrays * work.width)
  # copies of all three weights, and the gradient of one at a time
  weights = arrays * model.d_model * d_ff * (work.width + 4 / arrays)
  return _in_blocks(work, rows.places * share, rows.experts, per_row, weights)


def _in_blocks(
  work: Workload, places: float, num_experts: float, per_row: float, weights: float
) -> float:
  """Bytes of rows, and of the weights of each block of them where they are worked on in blocks."""
  if not work.blocks:
    return places * per_row
  width = 8
  while width * 4 * num_experts <= places:
    width *= 2
  blocks = places // width + num_experts
  return blocks * (width * per_row + weights)


def logits(work: Workload, layout: Layout) -> float:
  """Logits, float32, with their exponentials and gradient."""
  return work.tokens(layout) * work.vocab_size * (2 * 4 + work.width)


def embedding(work: Workload, layout: Layout) -> float:
  """Of its gradient: a whole table on every device, or the gradients of all tokens where there are fewer of them."""
  tokens = work.tokens(layout) * layout.batch_shards
  rows = work.vocab_size if work.sums_table(layout) else tokens
  return rows * work.settings.model.d_model * 4
