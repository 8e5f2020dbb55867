"""Rules of this code base that break things when they are broken; each is shown to be able to fail.

A rule is a function of (path, tree) that yields (line, complaint). Its file has RULES, which says where it holds,
OFFENDERS, a snippet that each rule must refuse, and INNOCENTS, what it must let pass.
"""

import ast

import pytest

from tests.house import axis_letters, safety, structure
from tests.house.source import parse, python_files

PARTS = (structure, safety, axis_letters)
RULES = {rule: folders for part in PARTS for rule, folders in part.RULES.items()}
OFFENDERS = [case for part in PARTS for case in part.OFFENDERS]
INNOCENTS = [case for part in PARTS for case in part.INNOCENTS]


def name_of(value):
  return getattr(value, '__name__', None)


@pytest.mark.parametrize('rule', RULES, ids=name_of)
def test_the_source_obeys(rule):
  complaints = [
    f'{path}:{line}: {complaint}'
    for path in python_files(RULES[rule])
    for line, complaint in rule(path, parse(path))
  ]
  assert not complaints, '\n'.join([rule.__doc__, *complaints])


@pytest.mark.parametrize(('rule', 'path', 'snippet'), OFFENDERS, ids=name_of)
def test_a_rule_refuses_its_offenders(rule, path, snippet):
  assert list(rule(path, ast.parse(snippet)))


@pytest.mark.parametrize(('rule', 'path', 'snippet'), INNOCENTS, ids=name_of)
def test_a_rule_lets_innocents_pass(rule, path, snippet):
  assert not list(rule(path, ast.parse(snippet)))


def test_every_rule_has_an_offender():
  assert {rule for rule, _, _ in OFFENDERS} == set(RULES)
