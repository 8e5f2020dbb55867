"""The optimizer: AdamW (Loshchilov & Hutter 2019) or Adafactor, with global norm clipping, on any pytree of arrays."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax

from experiments.adafactor import scale_by_adafactor
from experiments.settings import OptimSettings

# Parameters of layers are stacked, so a norm's scale has two axes: the name decides, not the rank. Scales, biases (of
# routers named offsets) and temperatures are not decayed; nor are embeddings (tokens, positions), whose rare rows would
# only shrink.
_NOT_DECAYED = re.compile(
  r'(^|/)((\w*_)?(scale|bias|offset|positions|temperature)|(\w*_)?(embed|norm))(/|$)'
)


def make_optimizer(optim: OptimSettings, params: Any) -> optax.GradientTransformation:
  """`optim.name` for `params`, any pytree of arrays, at learning rate 1: the training step multiplies by its rate.

  Clipping looks at the norm of all gradients together and comes first. Weight decay is decoupled and multiplied by
  the learning rate, as in optax and PyTorch.

  Raises:
    ValueError: a key of `optim.decay_of` that is the end of no parameter's path.
  """
  rates = decay_rates(optim, params)
  directions = {
    'adamw': lambda: optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
    'adafactor': lambda: scale_by_adafactor(optim),
  }

  def decay(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, p, rate: u + rate * p if rate else u, updates, params, rates)

  return optax.chain(
    optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
    directions[optim.name](),
    optax.stateless(decay),
    optax.scale(-1.0),
  )


def decay_rates(optim: OptimSettings, params: Any) -> Any:
  """The weight decay of every leaf of `params`: that of the longest key of `decay_of` which its path ends with, else
  `weight_decay` where `decay_mask` is True.

  Raises:
    ValueError: a key that is the end of no path.
  """
  given = dict(sorted(optim.decay_of.items(), key=lambda item: -len(item[0])))
  used = set()

  def rate(path: tuple[Any, ...], decayed: bool) -> float:
    name = f'/{_name(path)}'
    ends = [end for end in given if name.endswith(f'/{end}')]
    used.update(ends)
    return given[ends[0]] if ends else optim.weight_decay * decayed

  rates = jax.tree_util.tree_map_with_path(rate, decay_mask(params))
  for end in given.keys() - used:
    raise ValueError(f'optim.decay_of={end!r} is the end of no parameter: head/weight is one')
  return rates


def decay_mask(params: Any) -> Any:
  """True for the leaves of `params` that weight decay shrinks: matrices, the router's and the experts' included."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim >= 2 and not _NOT_DECAYED.search(_name(path)), params
  )


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
