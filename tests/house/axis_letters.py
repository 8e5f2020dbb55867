"""Letters of axes in annotations, names and einsums are those of moejax/axes.py."""

import ast
import re

from tests.house.source import LIBRARY, calls, dotted, parse

ARRAY_TYPE = re.compile(r'(B?Float|U?Int|Complex)\d*$|(Bool|Num|Shaped|Inexact|Integer|Real|Key)$')
# Ends of names that could be read as axes and are words.
WORDS = set(
  'id ids lo ref fn eps kept bits rest step rope cos sin by up down out num sum run use'.split()
)


def legend() -> dict[str, str]:
  """The AXES of moejax/axes.py, read without importing it."""
  for node in parse('moejax/axes.py').body:
    target = node.target if isinstance(node, ast.AnnAssign) else getattr(node, 'targets', [None])[0]
    if dotted(target) == 'AXES':
      return ast.literal_eval(node.value)
  raise ValueError('moejax/axes.py does not define AXES')


def array_dims(annotation) -> str | None:
  """The dimensions `'T D'` of the first `Float[Array, 'T D']` in an annotation."""
  for node in ast.walk(annotation) if annotation is not None else ():
    if isinstance(node, ast.Subscript) and ARRAY_TYPE.match(dotted(node.value).split('.')[-1]):
      if isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
        return getattr(node.slice.elts[1], 'value', None)
  return None


def suffix(name: str) -> str:
  """The axes in a name, lower case: `td` of `x_td`; '' of `group_ids` or `w_up`."""
  end = name.rsplit('_', 1)[-1] if '_' in name else ''
  axes = 2 <= len(end) <= 4 and end not in WORDS and set(end.upper()) <= set(legend())
  return end if axes else ''


def unknown(letters) -> str:
  return ''.join(sorted({x for x in letters if x.upper() not in legend()}))


def dimensions_in_legend(path, tree):
  """jaxtyping: letters of the legend (`D`, `D_in`), words in lower case, numbers, `*name` and `...`."""
  for node in ast.walk(tree):
    if not isinstance(node, ast.Subscript) or not (dims := array_dims(node)):
      continue
    for name in re.findall(r'[A-Za-z_]\w*', dims):
      name = name.strip('_')
      letter = len(name) == 1 or name[:1].isupper()
      if letter and name.split('_')[0] not in legend():
        yield node.lineno, f'dimension {name!r} of {dims!r} is not in moejax/axes.py'


def suffixes_in_legend(path, tree):
  """The end of a local name is its axes: known letters, and those that the annotation says."""
  for node in ast.walk(tree):
    name = node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else ''
    if isinstance(node, ast.arg | ast.AnnAssign):
      name = node.arg if isinstance(node, ast.arg) else dotted(node.target)
      letters = (array_dims(node.annotation) or '').split()
      if letters and all(len(x) == 1 for x in letters) and suffix(name):
        if suffix(name) != ''.join(letters).lower():
          yield node.lineno, f'{name} is annotated {" ".join(letters)!r}'
    end = re.search(r'_([b-df-hj-np-tv-z]{2,4})$', name)  # no vowel: hardly a word
    if end and end[1] not in WORDS and unknown(end[1]):
      yield node.lineno, f'{name}: axis {unknown(end[1])!r} is not in moejax/axes.py'


def einsums_in_legend(path, tree):
  """The letters of an einsum are of the legend, and each operand's suffix is its subscript."""
  for line, name, call in calls(tree):
    formula = getattr(call.args[0], 'value', None) if call.args else None
    if name.split('.')[-1] != 'einsum' or not isinstance(formula, str):
      continue
    if unknown(re.findall('[A-Za-z]', formula)):
      yield (
        line,
        f'einsum {formula!r}: {unknown(re.findall("[A-Za-z]", formula))!r} not in moejax/axes.py',
      )
    for term, operand in zip(formula.split('->')[0].split(','), call.args[1:], strict=False):
      axes = suffix(dotted(operand))
      if axes and '...' not in term and axes != term.strip().lower():
        yield (
          line,
          f'einsum {formula!r}: {dotted(operand)} stands where {term.strip()!r} is expected',
        )


RULES = {
  dimensions_in_legend: LIBRARY,
  suffixes_in_legend: LIBRARY,
  einsums_in_legend: LIBRARY,
}

OFFENDERS = [
  (dimensions_in_legend, 'moejax/a.py', "def f(x: Float[Array, 'T X']): return x"),
  (dimensions_in_legend, 'moejax/a.py', "def f(x: Float[Array, 'TK D']): return x"),
  (dimensions_in_legend, 'moejax/a.py', "def f(x) -> tuple[Int[Array, 't'], int]: return x"),
  (dimensions_in_legend, 'moejax/a.py', "def f(x: jt.Float32[Array, 'T X*D'] | None): return x"),
  (suffixes_in_legend, 'moejax/a.py', 'x_tx = f(x)'),
  (suffixes_in_legend, 'moejax/a.py', "def f(x_td: Float[Array, 'D T']): return x_td"),
  (suffixes_in_legend, 'moejax/a.py', "x_td: Float[Array, 'T D E'] = f()"),
  (einsums_in_legend, 'moejax/a.py', "jnp.einsum('tx,xd->td', x, w)"),
  (einsums_in_legend, 'moejax/a.py', "jnp.einsum('td,df->tf', w_df, x_td)"),
]

INNOCENTS = [
  (
    dimensions_in_legend,
    'moejax/a.py',
    "def f(x: Float[Array, '*batch #S 3 2*F D_in d_out ... _']): return x",
  ),
  (
    suffixes_in_legend,
    'moejax/a.py',
    "def f(token_ids: Int[Array, 'T'], w_up: Float[Array, 'E D F']): x_td = 1",
  ),
  (einsums_in_legend, 'moejax/a.py', "jnp.einsum('tke,ted->tkd', a_tke, f(b))"),
]
