"""What the rules read: the source as syntax trees, its imports and its calls."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = ('moejax', 'pallas_kernels')
PROGRAMS = (*LIBRARY, 'experiments', 'configs')
EVERYTHING = (*PROGRAMS, 'tests', 'scripts')


def python_files(folders):
  """Paths relative to the root of all Python files below `folders`."""
  return sorted(
    path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob('*.py')
  )


def parse(path):
  return ast.parse((ROOT / path).read_text(encoding='utf-8'), path)


def dotted(node) -> str:
  """`jax.lax.scan` of the expression `jax.lax.scan`; '' of what is not a chain of names."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
    return f'{base}.{node.attr}'
  return ''


def imports(tree):
  """(line, absolute module, imported name or None); relative imports stay inside their package."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name, None) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      yield from ((node.lineno, node.module, alias.name) for alias in node.names)


def calls(tree):
  """(line, dotted name of the function, node)."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      yield node.lineno, dotted(node.func), node
