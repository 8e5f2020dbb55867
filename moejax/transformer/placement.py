"""Which layers are mixtures of experts."""

from __future__ import annotations

ACCEPTED = "'none', 'all', 'every_N', 'last_half' or layer numbers like '4,5'"


def moe_layers(spec: str, num_layers: int) -> tuple[int, ...]:
  """Numbers, from 0, of the MoE layers among `num_layers`.

  - `'none'`, `'all'`
  - `'every_N'`: layers N-1, 2N-1, ... ('every_2': GShard, Switch, V-MoE "Every-2")
  - `'last_half'`: the upper half, of an odd number the smaller part (Soft MoE; sparse upcycling of ViT)
  - `'4,5'`: these

  Raises:
    ValueError: if spec is none of these, or names a layer that does not exist or the same layer twice.
  """
  if spec == 'none':
    return ()
  if spec == 'all':
    return tuple(range(num_layers))
  if spec == 'last_half':
    return tuple(range((num_layers + 1) // 2, num_layers))
  if spec.startswith('every_') and spec[6:].isdecimal() and int(spec[6:]) > 0:
    period = int(spec[6:])
    return tuple(range(period - 1, num_layers, period))
  parts = [part.strip() for part in spec.split(',')]
  if not all(part.isdecimal() for part in parts):
    raise ValueError(f'moe_layers={spec!r} is not {ACCEPTED}')
  return check_layers(tuple(int(part) for part in parts), num_layers)


def check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
  """`layers` in order; ValueError if one is out of range or named twice."""
  for layer in layers:
    if not 0 <= layer < num_layers:
      raise ValueError(
        f'moe_layers={layers} names layer {layer} of num_layers={num_layers}; layers are 0 to {num_layers - 1}'
      )
  if len(set(layers)) != len(layers):
    raise ValueError(f'moe_layers={layers} names a layer twice; each may stand there once')
  return tuple(sorted(layers))
