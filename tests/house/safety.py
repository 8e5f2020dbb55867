"""Nothing runs code from files, no error is lost, and tests assert."""

import ast
import re

from tests.house.source import EVERYTHING, calls, dotted, imports


def no_code_from_data(path, tree):
  """Nothing that is read from a file may run: no pickle, eval or exec."""
  for line, module, _ in imports(tree):
    if module.split('.')[0] in (
      'pickle',
      'cPickle',
      'dill',
      'cloudpickle',
      'marshal',
      'shelve',
      'joblib',
    ):
      yield line, f'{module} runs code from files'
  for line, name, call in calls(tree):
    if name in ('eval', 'exec'):
      yield line, f'{name}() runs code from data'
    for keyword in call.keywords:
      if keyword.arg == 'allow_pickle' and getattr(keyword.value, 'value', True) is not False:
        yield line, 'allow_pickle runs code from files'


def no_swallowed_errors(path, tree):
  """No `except Exception` that goes on, no missing package passed over in silence."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.ExceptHandler):
      continue
    kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
    names = {dotted(kind) if kind else 'everything' for kind in kinds}
    last = node.body[-1]
    if names & {'everything', 'Exception', 'BaseException'} and not isinstance(last, ast.Raise):
      yield node.lineno, f'except {", ".join(sorted(names))}: name the error, or raise at the end'
    if names & {'ImportError', 'ModuleNotFoundError'} and isinstance(last, ast.Pass):
      yield node.lineno, 'a missing package is passed over in silence'


def assertions_in_tests(path, tree):
  """Each test asserts: by `assert`, by raises or warns, or through a helper check_... or assert_..."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef) and function.name.startswith('test_'):
      called = [name.split('.')[-1].lstrip('_') for _, name, _ in calls(function)]
      asserts = any(isinstance(node, ast.Assert) for node in ast.walk(function))
      if not asserts and not any(
        re.match('raises$|warns$|check_|assert_', name) for name in called
      ):
        yield function.lineno, f'{function.name} asserts nothing'


RULES = {
  no_code_from_data: EVERYTHING,
  no_swallowed_errors: EVERYTHING,
  assertions_in_tests: ('tests',),
}

OFFENDERS = [
  (no_code_from_data, 'moejax/a.py', 'import pickle'),
  (no_code_from_data, 'moejax/a.py', 'x = eval("1 + 1")'),
  (no_code_from_data, 'moejax/a.py', 'import numpy as np\nnp.load("a.npy", allow_pickle=True)'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept Exception: x = 1'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept: x = 1'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept (ValueError, BaseException): x = 1'),
  (no_swallowed_errors, 'moejax/a.py', 'try:\n  import wandb\nexcept ImportError: pass'),
  (assertions_in_tests, 'tests/a.py', 'def test_runs():\n  f(x)'),
]

INNOCENTS = [
  (no_code_from_data, 'moejax/a.py', 'model.eval()\nnp.load("a.npy", allow_pickle=False)'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept BaseException:\n  clean()\n  raise'),
  (assertions_in_tests, 'tests/a.py', 'def test_a():\n  with pytest.raises(ValueError): f()'),
  (assertions_in_tests, 'tests/a.py', 'def test_a():\n  np.testing.assert_allclose(1, 1)'),
]
