"""Importing a module neither starts a backend nor changes the environment."""

import json
import os
import subprocess
import sys

from tests.house.source import PROGRAMS, ROOT, python_files

# JAX's Mosaic GPU notes there, when it is imported, where it found CUDA.
BY_JAX = {'MOSAIC_GPU_CUDA_ROOT'}
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
  found = import_alone(modules)
  assert set(found['environment']) <= BY_JAX and not found['backend'], found


def test_work_on_import_is_noticed(tmp_path):
  (tmp_path / 'offender.py').write_text(
    "import jax, os\nos.environ['XLA_FLAGS'] = ''\njax.devices()\n"
  )
  assert import_alone(['offender'], tmp_path) == {'environment': ['XLA_FLAGS'], 'backend': True}
