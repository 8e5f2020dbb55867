"""What the default suite leaves to the thorough tests, which CI runs beside it: more cases of the same properties."""

import pytest


def unless(usual: bool):
  """Marks of a parameter that is among the thorough tests (`pytest -m thorough`) unless it is a usual one."""
  return () if usual else pytest.mark.thorough


def thorough(*values):
  """Values of parameters, among the thorough tests."""
  return pytest.param(*values, marks=pytest.mark.thorough)


def and_thorough(usual, more):
  """Parameters: the `usual` ones in the default suite, then `more` among the thorough tests."""
  return [*usual, *map(thorough, more)]
