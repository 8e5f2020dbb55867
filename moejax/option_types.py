"""Types of options that come from a config, checked before anything computes with them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_NAMES = {bool: 'True or False', int: 'integers', float: 'numbers', str: 'texts', None: 'None'}


def check_types(where: str, make: Callable[..., Any], options: Mapping[str, Any]) -> None:
  """Compares values that a config may hold with the annotations of what they are given to.

  Args:
    where: for the message, such as "router 'top_p'".
    make: a function, a class or a partial of these; options that it does not annotate in a way that can be read are not
      looked at.
    options: by name. Values of other types than those of a config, such as arrays, are not looked at either.

  Raises:
    ValueError: a str where a number is expected, and the like.
  """
  annotated: Any = make
  while isinstance(annotated, functools.partial):
    annotated = annotated.func
  if isinstance(annotated, type) and not dataclasses.is_dataclass(annotated):
    annotated = inspect.getattr_static(annotated, '__init__')
  try:
    hints = typing.get_type_hints(annotated)
  except (NameError, TypeError):  # somebody's own, with names for type checkers alone, or an object
    return
  for name, value in options.items():
    kinds = _kinds(hints.get(name))
    plain = value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))
    if kinds and plain and not any(_fits(value, kind) for kind in kinds):
      accepted = ' or '.join(_NAMES.get(kind, 'lists of numbers') for kind in kinds)
      raise ValueError(f'{name}={value!r} of {where}: accepted are {accepted}')


def _kinds(hint: Any) -> list[Any]:
  """bool, int, float, str, Sequence, None of a hint; nothing for hints of other kinds."""
  if typing.get_origin(hint) in (types.UnionType, typing.Union):
    found = [_kinds(one) for one in typing.get_args(hint)]
    kinds = [kind for one in found for kind in one] if all(found) else []
    return [kind for kind in kinds if not (kind is int and float in kinds)]
  if hint is type(None):
    return [None]
  if typing.get_origin(hint) in (Sequence, tuple, list):
    return [Sequence]
  return [hint] if hint in (bool, int, float, str) else []


def _fits(value: Any, kind: Any) -> bool:
  if kind is None:
    return value is None
  if kind is Sequence:
    return isinstance(value, (list, tuple))
  if kind is float:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
  return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
