"""Command lines of programs without a config: argparse whose complaints are one sentence, and numbers with units."""

from __future__ import annotations

import argparse
import math
import re
from typing import NoReturn

from experiments.errors import BadInput

_UNITS = {'k': 1e3, 'M': 1e6, 'G': 1e9, 'B': 1e9, 'T': 1e12}


class Arguments(argparse.ArgumentParser):
  """An ArgumentParser that raises BadInput, and takes no shortened flags."""

  def __init__(self, program: str, description: str):
    super().__init__(
      prog=f'python -m {program}',
      description=description,
      allow_abbrev=False,
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )

  def error(self, message: str) -> NoReturn:
    raise BadInput(f'{self.prog}: {message}')


def number(text: str) -> float:
  """A finite number more than 0, such as 1e21, 16k, 1.5T."""
  match = re.fullmatch(r'([0-9.]+(?:[eE][+-]?[0-9]+)?)([kMGBT]?)', text)
  try:
    value = float(match[1]) * _UNITS.get(match[2], 1) if match else math.nan
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not accepted: it must be a number more than 0, such as 1e21 or 16k'
    )
  return value


def memory(text: str) -> float:
  """Bytes of '80GB' or '80GiB'."""
  match = re.fullmatch(r'([0-9.]+)(G|T)(i?)B', text)
  try:
    value = float(match[1]) if match else 0.0
  except ValueError:
    value = 0.0
  if match is None or not value > 0:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not accepted: it must be a size such as 80GB, 80GiB or 1TB'
    )
  power = {'G': 3, 'T': 4}[match[2]]
  return value * (1024 if match[3] else 1000) ** power


def counts(text: str) -> tuple[int, ...]:
  """Integers from 1, ascending, of '1,2,4'."""
  words = [word.strip() for word in text.split(',')]
  if not all(re.fullmatch('[1-9][0-9]{0,5}', word) for word in words):
    raise argparse.ArgumentTypeError(
      f'{text!r} is not accepted: it must be integers from 1, such as 1,2,4'
    )
  return tuple(sorted({int(word) for word in words}))


def fraction(text: str) -> float:
  """A number between 0 and 1, both left out."""
  try:
    value = float(text)
  except ValueError:
    value = 0.0
  if not 0 < value < 1:
    raise argparse.ArgumentTypeError(f'{text!r} is not accepted: it must lie between 0 and 1')
  return value


def whole(text: str) -> int:
  """An integer from 0."""
  if not re.fullmatch('[0-9]{1,9}', text):
    raise argparse.ArgumentTypeError(f'{text!r} is not accepted: it must be an integer from 0')
  return int(text)
