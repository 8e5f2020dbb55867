"""Tokens on their way: what the exchange of the experts and the axis `tensor` move in one training step.

Counts are those of steps compiled for TPUs (experiments/results/plans); `layers` and `forward` are those of `runs`.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.planning.exchanges import hops, hot, worked_on
from experiments.planning.moves import Move, along, over_fsdp_alone, runs
from experiments.planning.workload import Layout, Workload
from moejax.scaling.ours import latent_of

WINDOWED = 256 * 2**20
"""Bytes of a device's tokens from which latent attention's outputs travel in permutations, each beside a part of the
product that makes or reads them: compiled steps did so with 448 MiB and not with 16, and this is between."""


def exchange(work: Workload, layout: Layout) -> Iterator[Move]:
  """Rows to their experts and back, with the numbers of these experts."""
  if layout.expert == 1:
    return
  model = work.settings.model
  layers, forward = runs(work, layout)
  times = layout.microbatches * work.mixed
  width = model.d_model * work.width / layout.tensor
  expert, size = along(layout, ('expert',))
  if layout.exchange == 'all_gather':
    # outputs that were added up are not computed again; gradients go both ways
    whole = work.tokens(layout) * size
    yield Move('all-gather', expert, size, 'tokens', times * (forward + 1) * whole * width)
    yield Move('reduce-scatter', expert, size, 'tokens', times * (layers + 1) * whole * width)
    rows = whole * work.choices * 4
    yield Move('all-gather', expert, size, 'choices', times * forward * 2 * rows)
    yield Move('reduce-scatter', expert, size, 'choices', times * rows)
    return
  for hop in hops(work, layout):
    # outputs come back one by one, and the gradients of their weights need them again
    tokens, numbers = 2 * (forward + 1) * hop.sent * width, forward * hop.sent * hop.number
    yield Move(hop.kind, expert, hop.size, 'tokens', times * tokens, hop.part)
    yield Move(hop.kind, expert, hop.size, 'choices', times * numbers, hop.part)
  copied = layout.microbatches * copies(work, layout) * work.width
  yield Move('all-gather', expert, size, 'experts', (layers + 1) * copied)
  yield Move('reduce-scatter', expert, size, 'experts', copied)


def copies(work: Workload, layout: Layout) -> float:
  """Numbers of the experts of all layers that every device has copies of, its own among them."""
  whole = sum(elements for tensor, elements in work.classes if tensor.group == 'experts')
  counts = [count for _, count in work.mixtures]
  if not counts:
    return 0.0
  return whole / sum(counts) * hot(work, layout) * len(counts) / layout.tensor


def tensor_parallel(work: Workload, layout: Layout) -> Iterator[Move]:
  """Tokens are cut by model width between layers: gathered where a layer reads them, its partial sums scattered."""
  axes, size = along(layout, ('tensor',))
  if size == 1:
    return
  model = work.settings.model
  layers, forward = runs(work, layout)
  mixtures = work.mixed
  dense = sum(work.shares) - mixtures + (mixtures if model.moe.num_shared else 0)
  token = layout.microbatches * work.tokens(layout) * model.d_model * work.width
  yield from _attention(work, layout)
  yield from _ends(work, layout)
  yield Move('all-gather', axes, size, 'activations', dense * (forward + 1) * token)
  yield Move('reduce-scatter', axes, size, 'activations', dense * (layers + 1) * token)
  if not mixtures:
    return
  row = layout.microbatches * model.d_model * work.width
  for rows in worked_on(work, layout):
    # rows that arrive one by one, or tokens, which are added up there
    tokens = layout.exchange in ('local', 'all_gather') or rows.copies
    held = rows.places / work.choices if tokens else rows.places
    back = (layers if tokens else forward) + 1
    # tokens that stay are gathered once for shared experts too
    shared = int(model.moe.num_shared > 0 and (layout.exchange == 'local' or rows.copies))
    yield Move('all-gather', axes, size, 'tokens', mixtures * (forward + 1 - shared) * held * row)
    yield Move('reduce-scatter', axes, size, 'tokens', mixtures * back * held * row)
  scores = sum(share * count for share, count in work.mixtures) * 4
  whole = layout.microbatches * work.tokens(layout) * scores
  yield Move('all-reduce', axes, size, 'router', forward * whole)


def _attention(work: Workload, layout: Layout) -> Iterator[Move]:
  """Grouped attention reads tokens whole; latent attention adds up latents that each device has a part of.

  What its heads add up to is scattered, and the gradient of that gathered for two products; both in the loops of these
  products where the tokens are `WINDOWED`.
  """
  model, latent = work.settings.model, latent_of(work.settings.model)
  axes, size = along(layout, ('tensor',))
  _, forward = runs(work, layout)
  each = layout.microbatches * sum(work.shares) * work.tokens(layout) * work.width
  if latent is None:
    norm = model.qk_norm and model.qk_norm_scope == 'all'  # over heads of several devices
    gathers = forward + 3 + norm
    yield Move('all-gather', axes, size, 'activations', each * gathers * model.d_model)
    yield Move('reduce-scatter', axes, size, 'activations', each * (forward + 1) * model.d_model)
    return
  ranks = latent.q_rank + latent.kv_rank + latent.rotary_dim
  yield Move('all-reduce', axes, size, 'activations', each * (forward + 1) * ranks)
  wide = each * model.d_model
  if work.tokens(layout) * model.d_model * work.width >= WINDOWED:
    yield Move('collective-permute', axes, size, 'activations', (forward + 2) * wide)
    return
  yield Move('all-gather', axes, size, 'activations', 2 * wide)
  yield Move('reduce-scatter', axes, size, 'activations', forward * wide)


def _ends(work: Workload, layout: Layout) -> Iterator[Move]:
  """The gradient of the embedding needs tokens whole; the head does too, or adds up partial logits, float32.

  The TPU compiler does the latter where the batch is sharded over more axes than `fsdp`.
  """
  axes, size = along(layout, ('tensor',))
  layers, _ = runs(work, layout)
  tokens = layout.microbatches * work.tokens(layout)
  d_model = work.settings.model.d_model
  yield Move('all-gather', axes, size, 'activations', tokens * d_model * 4)
  if over_fsdp_alone(layout):
    yield Move('all-gather', axes, size, 'activations', layers * tokens * d_model * work.width)
  else:
    yield Move('all-reduce', axes, size, 'logits', layers * tokens * work.vocab_size * 4)
