"""Which token went to which expert, layer by layer."""

from __future__ import annotations

import dataclasses

from moejax.arrays import Assignment, SoftPlan
from moejax.moe.layer import MoE
from moejax.transformer.block import Block
from moejax.transformer.decoder import Decoder
from moejax.transformer.stack import context_of


def routing_trace(model: Decoder, tokens, **inputs) -> list[Assignment | SoftPlan]:
  """What the router of every mixture decides, in layer order.

  Layers run one by one, so that this is slower than the model itself; for studies of routing. Mixtures inside of
  blocks that tokens skip are left out.

  Args:
    model: a decoder or encoder.
    tokens: int `[B, S]`.
    inputs: as of a call of the model.
  """
  x, context, turn, visible = model.enter(tokens, **inputs)
  found = []
  context = model.stack.prepare(x, context, visible)
  for layer, block in enumerate(model.stack.unstack()):
    own = context_of(layer, context)
    if isinstance(block, Block) and isinstance(block.moe, MoE):
      h = block.ffn_norm(block.attend(x, own, turn, visible)[0])
      found.append(block.moe.router(block.moe.reads(h, own.state or {}), own))
    x, _, state = block(x, own, turn, visible)
    context = dataclasses.replace(context, state=state)
  return found
