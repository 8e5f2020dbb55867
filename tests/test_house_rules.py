"""Rules of this code base that break things when they are broken; each is shown to be able to fail.

A rule is a function of (path, tree) that yields (line, complaint); RULES says where it holds. OFFENDERS
has a snippet that each rule must refuse, INNOCENTS what it must let pass.
"""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = ('moejax', 'pallas_kernels')
PROGRAMS = (*LIBRARY, 'experiments', 'configs')
EVERYTHING = (*PROGRAMS, 'tests', 'scripts')

# ---- reading the source --------------------------------------------------------------------------


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


# ---- structure -----------------------------------------------------------------------------------

OWN = {*PROGRAMS, 'tests', 'scripts', 'notebooks'}
MAY_IMPORT = {
  'pallas_kernels': {'pallas_kernels'},
  'moejax': {'moejax', 'pallas_kernels'},
  'experiments': {'experiments', 'moejax', 'pallas_kernels'},
}


def import_direction(path, tree):
  """pallas_kernels <- moejax <- experiments; configs import ml_collections and configs.common only."""
  package = path.split('/')[0]
  for line, module, name in imports(tree):
    top = module.split('.')[0]
    if package == 'configs':
      common = module == 'configs.common' or (module == 'configs' and name == 'common')
      if top not in ('ml_collections', '__future__') and not common:
        yield line, f'a config imports {module}; only ml_collections and configs.common are allowed'
    elif top in OWN and top not in MAY_IMPORT[package]:
      yield line, f'{package} imports {module}; allowed: {sorted(MAY_IMPORT[package])}'


NNX = set('Module Param Variable Rngs List initializers split merge state update'.split())
NNX |= {'to_pure_dict', 'replace_by_pure_dict'}


def narrow_nnx(path, tree):
  """Only these names of flax.nnx: its transforms are slow, and sown values vanish inside lax.scan."""
  for line, module, name in imports(tree):
    if module == 'flax.nnx' and name is not None and name not in NNX:
      yield line, f'flax.nnx.{name} is not among the allowed names {sorted(NNX)}'
    if module.startswith('flax.nnx.') and module.split('.')[2] not in NNX:
      yield line, f'{module} is not among the allowed names {sorted(NNX)}'
    if module == 'flax.linen' or (module == 'flax' and name == 'linen'):
      yield line, 'modules are flax.nnx, not flax.linen'
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      if dotted(node.value) in ('nnx', 'flax.nnx') and node.attr not in NNX:
        yield node.lineno, f'nnx.{node.attr} is not among the allowed names {sorted(NNX)}'
      if node.attr in ('sow', 'perturb', 'capture'):
        yield node.lineno, f'.{node.attr}: return the value instead, or it is lost in a scan'
      if dotted(node) == 'self.rngs':
        yield node.lineno, 'nnx.Rngs live in __init__ only; draw from Context.rng'


def pure_calls(path, tree):
  """`self.x = ...` in a `__call__` is dropped silently under jit."""
  for function in ast.walk(tree):
    if isinstance(function, ast.FunctionDef) and function.name == '__call__':
      for node in ast.walk(function):
        stored = isinstance(getattr(node, 'ctx', None), ast.Store)
        while stored and isinstance(node, ast.Attribute | ast.Subscript):
          node = node.value
          if dotted(node) == 'self':
            yield function.lineno, '__call__ assigns to self; return the value'


def no_private_jax(path, tree):
  """jax._src changes without notice: one file, compat.py, may know it."""
  if pathlib.PurePosixPath(path).name == 'compat.py':
    return
  for line, module, name in imports(tree):
    if f'{module}.{name}.'.startswith('jax._src.'):
      yield line, 'jax._src outside of compat.py'
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and dotted(node) == 'jax._src':
      yield node.lineno, 'jax._src outside of compat.py'


def no_backend_question(path, tree):
  """A library that asks for devices starts a backend, and cannot be compiled for another platform."""
  asked = {'devices', 'local_devices', 'default_backend'}
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and dotted(node.value) == 'jax' and node.attr in asked:
      yield node.lineno, f'jax.{node.attr}: use the mesh, or jax.lax.platform_dependent'
  for line, module, name in imports(tree):
    if module == 'jax' and name in asked:
      yield line, f'jax.{name}: use the mesh, or jax.lax.platform_dependent'


# ---- safety --------------------------------------------------------------------------------------


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


# ---- axis letters --------------------------------------------------------------------------------

ARRAY_TYPE = re.compile(r'(B?Float|U?Int|Complex)\d*$|(Bool|Num|Shaped|Inexact|Integer|Real|Key)$')
# Ends of names that could be read as axes and are words.
WORDS = set('id ids lo ref fn eps kept bits rest step rope cos sin by down'.split())


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


# ---- the rules, and that they can fail -----------------------------------------------------------

RULES = {
  import_direction: PROGRAMS,
  narrow_nnx: PROGRAMS,
  pure_calls: PROGRAMS,
  no_private_jax: PROGRAMS,
  no_backend_question: LIBRARY,
  no_code_from_data: EVERYTHING,
  no_swallowed_errors: EVERYTHING,
  assertions_in_tests: ('tests',),
  dimensions_in_legend: LIBRARY,
  suffixes_in_legend: LIBRARY,
  einsums_in_legend: LIBRARY,
}

OFFENDERS = [
  (import_direction, 'pallas_kernels/a.py', 'from moejax.moe import layer'),
  (import_direction, 'moejax/a.py', 'def f():\n  import experiments.train'),
  (import_direction, 'moejax/a.py', 'from tests import helpers'),
  (import_direction, 'experiments/a.py', 'import configs.tiny'),
  (import_direction, 'configs/a.py', 'import jax'),
  (import_direction, 'configs/a.py', 'from configs import tiny'),
  (narrow_nnx, 'moejax/a.py', 'from flax import nnx\n@nnx.jit\ndef f(x): return x'),
  (narrow_nnx, 'moejax/a.py', 'from flax.nnx import scan'),
  (narrow_nnx, 'moejax/a.py', 'import flax\nflax.nnx.pop(m, flax.nnx.Intermediate)'),
  (narrow_nnx, 'moejax/a.py', 'from flax import linen as nn'),
  (narrow_nnx, 'moejax/a.py', 'def f(self, x): self.sow("losses", "z", x)'),
  (narrow_nnx, 'moejax/a.py', 'def f(self, rngs): self.rngs = rngs'),
  (pure_calls, 'moejax/a.py', 'class A:\n  def __call__(self, x):\n    self.seen = x'),
  (pure_calls, 'moejax/a.py', 'class A:\n  def __call__(self, x):\n    self.bias[...] += x'),
  (no_private_jax, 'moejax/a.py', 'from jax._src import core'),
  (no_private_jax, 'moejax/a.py', 'from jax import _src'),
  (no_private_jax, 'moejax/a.py', 'import jax\njax._src.core.find()'),
  (no_backend_question, 'moejax/a.py', 'import jax\nif jax.default_backend() == "cpu": pass'),
  (no_backend_question, 'moejax/a.py', 'from jax import devices'),
  (no_code_from_data, 'moejax/a.py', 'import pickle'),
  (no_code_from_data, 'moejax/a.py', 'x = eval("1 + 1")'),
  (no_code_from_data, 'moejax/a.py', 'import numpy as np\nnp.load("a.npy", allow_pickle=True)'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept Exception: x = 1'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept: x = 1'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept (ValueError, BaseException): x = 1'),
  (no_swallowed_errors, 'moejax/a.py', 'try:\n  import wandb\nexcept ImportError: pass'),
  (assertions_in_tests, 'tests/a.py', 'def test_runs():\n  f(x)'),
  (dimensions_in_legend, 'moejax/a.py', "def f(x: Float[Array, 'T X']): return x"),
  (dimensions_in_legend, 'moejax/a.py', "def f(x: Float[Array, 'TK D']): return x"),
  (dimensions_in_legend, 'moejax/a.py', "def f(x) -> tuple[Int[Array, 't'], int]: return x"),
  (dimensions_in_legend, 'moejax/a.py', "def f(x: jt.Float32[Array, 'T U*D'] | None): return x"),
  (suffixes_in_legend, 'moejax/a.py', 'x_tz = f(x)'),
  (suffixes_in_legend, 'moejax/a.py', "def f(x_td: Float[Array, 'D T']): return x_td"),
  (suffixes_in_legend, 'moejax/a.py', "x_td: Float[Array, 'T D E'] = f()"),
  (einsums_in_legend, 'moejax/a.py', "jnp.einsum('tx,xd->td', x, w)"),
  (einsums_in_legend, 'moejax/a.py', "jnp.einsum('td,df->tf', w_df, x_td)"),
]

INNOCENTS = [
  (
    import_direction,
    'moejax/a.py',
    'from pallas_kernels import expert_ffn\nfrom . import axes\nimport jax',
  ),
  (import_direction, 'configs/a.py', 'import ml_collections\nfrom configs import common'),
  (
    narrow_nnx,
    'moejax/a.py',
    'nnx.split(nnx.Module())\nnnx.initializers.normal(1.0)\noptions.pop("name")',
  ),
  (
    pure_calls,
    'moejax/a.py',
    'class A:\n  def __call__(self, x):\n    y = self.w[...]\n    return y',
  ),
  (no_private_jax, 'moejax/compat.py', 'from jax._src import core'),
  (no_code_from_data, 'moejax/a.py', 'model.eval()\nnp.load("a.npy", allow_pickle=False)'),
  (no_swallowed_errors, 'moejax/a.py', 'try: f()\nexcept BaseException:\n  clean()\n  raise'),
  (assertions_in_tests, 'tests/a.py', 'def test_a():\n  with pytest.raises(ValueError): f()'),
  (assertions_in_tests, 'tests/a.py', 'def test_a():\n  np.testing.assert_allclose(1, 1)'),
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


# ---- text ----------------------------------------------------------------------------------------

# Notes to oneself, and absolute paths of one person's machine.
UNWANTED = re.compile(
  r'\b(T[O]DO|F[I]XME|X[X]X|H[A]CK)\b|(?<![\w.~:/-])/(home|root|Users|work)/(?!someone)\w'
)
TEXT = ('.py', '.md', '.cfg', '.toml', '.sh', '.yml', '.yaml', '.cff', '.ipynb', '')


def unwanted(text: str) -> list[str]:
  return [line.strip() for line in text.splitlines() if UNWANTED.search(line)]


def text_files():
  folders = [ROOT / name for name in (*EVERYTHING, 'notebooks', '.ci')]
  below = [path for folder in folders for path in folder.rglob('*')]
  return [path for path in [*ROOT.iterdir(), *below] if path.is_file() and path.suffix in TEXT]


def test_no_text_holds_unfinished_notes_or_private_paths():
  found = {path.name: unwanted(path.read_text(encoding='utf-8')) for path in text_files()}
  assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize('text', ['# TO' + 'DO: later', "open('/" + "home/ann/data')"])
def test_unfinished_notes_and_private_paths_are_found(text):
  assert unwanted(text)


# ---- imports -------------------------------------------------------------------------------------

PROBE = """
import importlib, json, os, sys
from jax._src import xla_bridge
before = dict(os.environ)
for name in sys.argv[1:]:
  importlib.import_module(name)
changed = sorted(k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k))
print(json.dumps({'environment': changed, 'backend': xla_bridge.backends_are_initialized()}))
"""


def import_alone(names, folder=ROOT):
  """Imports modules in a fresh process; what came out: printed text, changed environment, backend."""
  paths = os.pathsep.join([str(folder), str(ROOT)])
  done = subprocess.run(
    [sys.executable, '-c', PROBE, *names],
    env={**os.environ, 'PYTHONPATH': paths},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout)


def test_importing_every_module_does_no_work():
  modules = [
    path[:-3].replace('/', '.').removesuffix('.__init__') for path in python_files(PROGRAMS)
  ]
  modules = [name for name in modules if not name.endswith('__main__')]
  assert import_alone(modules) == {'environment': [], 'backend': False}


def test_work_on_import_is_noticed(tmp_path):
  (tmp_path / 'offender.py').write_text(
    "import jax, os\nos.environ['XLA_FLAGS'] = ''\njax.devices()\n"
  )
  assert import_alone(['offender'], tmp_path) == {'environment': ['XLA_FLAGS'], 'backend': True}


# ---- the session of conftest.py --------------------------------------------------------------------


def test_the_session_has_eight_devices_and_strict_numerics():
  assert jax.device_count() >= 8 or jax.default_backend() != 'cpu'
  with pytest.raises(ValueError, match='rank_promotion'):
    jnp.ones((2, 3)) + jnp.ones(3)
  with pytest.raises(ValueError, match='promotion'):
    jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)


def test_relaxed_promotion_lasts_one_test(standard_promotion):
  assert (jnp.ones(3, jnp.float32) + jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32


def test_float64_lasts_one_test(x64):
  assert jnp.ones(3, 'float64').dtype == jnp.float64


def test_shapes_are_checked_in_the_library_but_not_in_records():
  hooks = [hook for hook in sys.meta_path if hasattr(hook, 'should_instrument')]
  for name, checked in {'moejax.moe.dispatch': True, 'moejax.arrays': False, 'jax': False}.items():
    assert any(hook.should_instrument(name) for hook in hooks) == checked


def test_a_mesh_has_automatic_axes(make_mesh):
  mesh = make_mesh(data=2, expert=4)
  assert dict(mesh.shape) == {'data': 2, 'expert': 4}
  assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
