"""Reading a nested dict into nested frozen dataclasses, with one sentence for every mistake.

A field's type is its rule: a dataclass (a section), a Literal (one of), bool, int, float or str with an optional
`Annotated[..., Rule]` (a range), or a dict of options (a section whose keys are free).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experiments.errors import BadInput

Section = TypeVar('Section')


@dataclasses.dataclass(frozen=True)
class Rule:
  """A range: `text` completes "it must be ..."."""

  text: str
  accepts: Callable[[Any], bool]


def read(section: type[Section], values: Mapping[str, Any], prefix: str = '') -> Section:
  """An instance of dataclass `section` with the values given.

  Raises:
    BadInput: a key is unknown or missing, or its value has another type or lies outside its range.
  """
  hints = typing.get_type_hints(section, include_extras=True)
  for key in values:
    if key not in hints:
      raise BadInput(unknown_key(f'{prefix}{key}', [f'{prefix}{name}' for name in hints]))
  for key in hints:
    if key not in values:
      raise BadInput(f'{prefix}{key} is missing: configs/common.py has the default of every key')
  return section(**{key: _value(hint, values[key], prefix + key) for key, hint in hints.items()})


def unknown_key(key: str, accepted: list[str], beside: list[str] | None = None) -> str:
  """The sentence for a key that does not exist: the nearest accepted one, or else all `beside` it, or of them."""
  sections = {name.rpartition('.')[0] for name in accepted}
  near = difflib.get_close_matches(key, accepted, n=1, cutoff=0.75) or [
    name
    for name in accepted
    if name.rpartition('.')[2] == key.rpartition('.')[2] and name not in sections
  ]
  if near:
    return f'{key} is not a setting: did you mean {near[0]}?'
  return f'{key} is not a setting: accepted are {", ".join(beside or accepted)}'


def refuse(key: str, value: Any, accepted: str) -> BadInput:
  """The error for a value that is not accepted."""
  scalar = value is None or isinstance(value, (bool, int, float, str))
  shown = repr(value) if scalar else f'<{type(value).__name__}>'
  return BadInput(f'{key}={shown} is not accepted: it must be {accepted}')


def _value(hint: Any, value: Any, key: str) -> Any:
  origin = typing.get_origin(hint)
  if origin is typing.Annotated:
    kind, rule = typing.get_args(hint)
    result = _value(kind, value, key)
    if not rule.accepts(result):
      raise refuse(key, value, rule.text)
    return result
  if origin is typing.Literal:
    return _choice(typing.get_args(hint), value, key)
  if origin is dict:
    return _options(typing.get_args(hint)[1], value, key)
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise refuse(key, value, 'a section of settings')
    return read(typing.cast(type, hint), value, f'{key}.')
  return _scalar(hint, value, key)


def _choice(choices: tuple[Any, ...], value: Any, key: str) -> Any:
  if value not in choices:
    raise refuse(key, value, f'one of {", ".join(map(str, choices))}')
  return value


def _options(hint: Any, value: Any, key: str) -> dict[str, Any]:
  """A section with free keys: numbers only, or any option (scalars, None and tuples of them)."""
  if not isinstance(value, Mapping):
    raise refuse(key, value, 'a section of options')
  read_one = _option if hint is Any else lambda one, name: _value(hint, one, name)
  return {str(name): read_one(one, f'{key}.{name}') for name, one in value.items()}


def _option(value: Any, key: str) -> Any:
  if value is None:  # such as capacity_factor=None, dropless: what it means the option knows
    return None
  if isinstance(value, (list, tuple)):
    return tuple(_option(one, f'{key}[{index}]') for index, one in enumerate(value))
  for kind in (bool, int, float, str):
    if isinstance(value, kind):
      return _scalar(kind, value, key)
  raise refuse(key, value, 'a number, a bool, a str, None or a tuple of these')


def _scalar(kind: type, value: Any, key: str) -> Any:
  """True is no int, None is nothing, an int is a float, and floats are finite."""
  if kind is float and type(value) is int:
    value = float(value)
  if type(value) is not kind:
    names = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a str'}
    raise refuse(key, value, names[kind])
  if isinstance(value, float) and not math.isfinite(value):
    raise refuse(key, value, 'finite')
  return value
