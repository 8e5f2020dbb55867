"""The optimizer: AdamW (Loshchilov & Hutter 2019) with global norm clipping, on any pytree of arrays."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from experiments.settings import OptimSettings

# Parameters of layers are stacked, so a norm's scale has two axes: the name decides, not the rank. Scales, biases and
# temperatures are not decayed; nor are embeddings (tokens, positions), whose rare rows would only shrink.
_NOT_DECAYED = re.compile(
  r'(^|/)((\w*_)?(scale|bias|positions|temperature)|(\w*_)?(embed|norm))(/|$)'
)


def make_optimizer(optim: OptimSettings, params: Any) -> optax.GradientTransformation:
  """AdamW for `params`, any pytree of arrays, at learning rate 1: the training step multiplies by its rate.

  Clipping looks at the norm of all gradients together and comes first. Weight decay is decoupled and multiplied by
  the learning rate, as in optax and PyTorch.
  """
  return optax.chain(
    optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
    optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    optax.add_decayed_weights(optim.weight_decay, decay_mask(params)),
    optax.scale(-1.0),
  )


def decay_mask(params: Any) -> Any:
  """True for the leaves of `params` that weight decay shrinks: matrices, the router's and the experts' included."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim >= 2 and not _NOT_DECAYED.search(_name(path)), params
  )


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
