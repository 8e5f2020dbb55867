"""What only the library knows to be wrong with a router, before anything is built."""

from __future__ import annotations

from experiments.errors import BadInput
from experiments.heads import check_heads
from experiments.mixtures import RouterFacts, router_facts
from experiments.settings import Settings
from moejax.moe.kinds import BARE, check_moves
from moejax.moe.losses import check_losses
from moejax.routers import SHARED


def check_routing(settings: Settings) -> None:
  """Refuses what only the library knows to be wrong, before anything is computed.

  Raises:
    BadInput: an unknown router, router option or loss, an option out of its range, or a router that looks at
      later tokens in a causal model.
  """
  check_heads(settings)
  facts = _facts(settings) if settings.model.moe_layers else None
  _check_depth(settings, facts)
  if facts is None:
    return
  moe = settings.model.moe
  _check_optim(settings, facts)
  if moe.pyramid and (moe.router['name'] in SHARED or facts.flags.has_state or moe.momentum):
    raise BadInput(
      f'model.moe.pyramid={moe.pyramid} with router {moe.router["name"]!r}: accepted are routers without a state over '
      'depth, and no momentum'
    )
  if facts.slots and moe.implementation != 'auto':
    raise BadInput(
      f'model.moe.implementation={moe.implementation!r} with router {moe.router["name"]!r}, whose slots are batched '
      "matmuls: accepted is 'auto'"
    )
  _check_group_size(settings)
  _check_needs(settings, facts.flags.needs)
  if settings.model.kind == 'decoder' and not facts.flags.prefix_safe and not settings.allow_leak:
    name = moe.router['name']
    safe = "model.moe.router.name='top_k'"
    if moe.kind == 'nested':
      raise BadInput(
        f"model.moe.kind={moe.kind!r} lets a token see later ones: accepted are other kinds, model.kind='encoder' or "
        "'vit', or allow_leak=True"
      )
    if name in ('expert_choice', 'sinkhorn_expert_choice', 'sparse_expert_choice'):
      safe = "model.moe.router.group='position'"
    elif name in ('top_k', 'gshard', 'vmoe'):
      safe = "model.moe.router.priority='token_major', capacity_factor=None"
    raise BadInput(
      f"model.moe.router={moe.router} lets a token see later ones, so a model of kind 'decoder' would train on what "
      f'it has to predict: accepted are {safe}, or allow_leak=True'
    )


def _facts(settings: Settings) -> RouterFacts:
  """What is known of the mixtures.

  Raises:
    BadInput: what the library refuses.
  """
  moe = settings.model.moe
  try:
    check_losses(moe.losses)
    facts = router_facts(settings.model)
    check_moves(moe.kind, moe.losses)
  except (ValueError, TypeError) as error:
    raise BadInput(f'model.moe: {error}') from error
  return facts


def _check_optim(settings: Settings, facts: RouterFacts) -> None:
  """Refuses updates after the optimizer's step that would find nothing to move."""
  moe, optim = settings.model.moe, settings.optim
  for key in ('bias_rate', 'average_rate'):
    value = getattr(optim, key)
    if value and moe.kind in BARE:
      raise BadInput(f'optim.{key}={value} with model.moe.kind={moe.kind!r}: accepted is 0')
  if optim.bias_rate and not facts.has_bias:
    raise BadInput(
      f'optim.bias_rate={optim.bias_rate} with router {moe.router["name"]!r} without a bias to move: '
      "accepted are model.moe.router={'name': 'top_k', 'balance_bias': True, ...}, or 0"
    )


def _check_depth(settings: Settings, facts: RouterFacts | None) -> None:
  """Refuses blocks that tokens skip where the choice would look ahead, or lose a state."""
  model = settings.model
  if not model.depth_layers:
    return
  if model.kind == 'decoder' and not settings.allow_leak:
    raise BadInput(
      f'model.depth.layers={model.depth.layers!r} lets later tokens decide in training who skips a block: '
      "accepted are 'none', model.kind='encoder', or allow_leak=True"
    )
  moe = model.moe
  if facts and (moe.router['name'] in SHARED or moe.momentum or facts.flags.has_state):
    raise BadInput(
      f'model.depth.layers={model.depth.layers!r} with router {moe.router["name"]!r}: accepted are routers without a '
      'state over depth, and no momentum'
    )


def _check_needs(settings: Settings, needs: tuple[str, ...]) -> None:
  """Refuses a router that asks for what neither the model nor the data can tell."""
  moe, kind = settings.model.moe, settings.model.kind
  for field in set(needs) - {'shared'}:
    if field != 'token_ids':
      raise BadInput(
        f'model.moe.router={moe.router} needs {field}, which data.name={settings.data.name!r} has none of: accepted '
        f'are routers that need none, or a program of your own that passes side={{{field!r}: ...}} to the model'
      )
    if kind == 'vit':
      raise BadInput(
        f'model.moe.router={moe.router} needs token ids, which a model of kind {kind!r} has none of: '
        "accepted are model.kind='decoder', 'encoder'"
      )


def _check_group_size(settings: Settings) -> None:
  size = settings.model.moe.router.get('group_size')
  microbatch = settings.batch_size // settings.microbatches
  if size and microbatch % size:
    raise BadInput(
      f'model.moe.router.group_size={size} does not divide the {microbatch} sequences of a microbatch '
      '(batch_size / microbatches)'
    )


def check_vocabulary(settings: Settings, num_tokens: int | None) -> None:
  """Refuses routers by token id that do not know all ids of the tokenizer: the others would go where the last one goes.

  Raises:
    BadInput: fewer ids in the router's `vocab_size` or `counts` than `num_tokens`, those of the tokenizer.
  """
  if not settings.model.moe_layers or num_tokens is None:
    return
  router = settings.model.moe.router
  counts = router.get('counts')
  known = {
    'vocab_size': router.get('vocab_size'),
    'counts': None if counts is None else len(counts),
  }
  for option, ids in known.items():
    if ids is not None and ids < num_tokens:
      raise BadInput(
        f'model.moe.router.{option} of {ids} ids is less than the {num_tokens} of data.tokenizer='
        f'{settings.data.tokenizer!r}: accepted are as many, or more'
      )
