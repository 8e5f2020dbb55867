"""Who may import what, and which names of flax and jax may be used."""

import ast
import pathlib

from tests.house.source import LIBRARY, PROGRAMS, dotted, imports

OWN = {*PROGRAMS, 'tests', 'scripts', 'notebooks'}
MAY_IMPORT = {
  'pallas_kernels': {'pallas_kernels'},
  'moejax': {'moejax', 'pallas_kernels'},
  'experiments': {'experiments', 'moejax', 'pallas_kernels'},
}


def import_direction(path, tree):
  """pallas_kernels <- moejax <- experiments; configs import ml_collections and other configs only."""
  package = path.split('/')[0]
  for line, module, _name in imports(tree):
    top = module.split('.')[0]
    if package == 'configs':
      config = module == 'configs' or module.startswith('configs.')
      if top not in ('ml_collections', '__future__') and not config:
        yield line, f'a config imports {module}; only ml_collections and configs are allowed'
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


RULES = {
  import_direction: PROGRAMS,
  narrow_nnx: PROGRAMS,
  pure_calls: PROGRAMS,
  no_private_jax: PROGRAMS,
  no_backend_question: LIBRARY,
}

OFFENDERS = [
  (import_direction, 'pallas_kernels/a.py', 'from moejax.moe import layer'),
  (import_direction, 'moejax/a.py', 'def f():\n  import experiments.train'),
  (import_direction, 'moejax/a.py', 'from tests import helpers'),
  (import_direction, 'experiments/a.py', 'import configs.tiny'),
  (import_direction, 'configs/a.py', 'import jax'),
  (import_direction, 'configs/a.py', 'from configs_of_mine import tiny'),
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
]
