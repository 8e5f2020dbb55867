"""Settings of every test: eight CPU devices, strict numerics, shapes checked at public borders."""

import functools
import gc
import importlib.metadata
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 8


def with_test_flags(flags: str, count: int) -> str:
  """XLA's flags with `count` host devices and quick compiles, and whatever else the user has set.

  The suite compiles some thousand small programs: LLVM's optimisations would be a third of its time, and fused loops
  as much again; cutting each into parts for several threads another sixth. Programs that tests start as processes of
  their own, unless they ask for these flags, and CI's training run are compiled as users compile them.
  """
  ours = {'--xla_force_host_platform_device_count': count, '--xla_backend_optimization_level': 0}
  ours['--xla_cpu_parallel_codegen_split_count'] = 1
  # emulated devices that wait for each other on a crowded machine: XLA ends the process after 40 s
  ours['--xla_cpu_collective_call_terminate_timeout_seconds'] = 240
  if importlib.metadata.version('jaxlib').startswith('0.10.'):  # XLA ends on flags it does not know
    ours['--xla_cpu_use_fusion_emitters'] = 'false'
    # XLA's library of products is a tenth of a small program's time; the run that .ci/run trains has it.
    ours['--xla_cpu_experimental_ynn_fusion_type'] = ''
  kept = [flag for flag in flags.split() if flag.partition('=')[0] not in ours]
  return ' '.join([*kept, *(f'{name}={value}' for name, value in ours.items())])


# JAX reads these when it is imported. JAX_PLATFORMS=cuda in the environment runs the tests on a GPU.
os.environ['XLA_FLAGS'] = with_test_flags(os.environ.get('XLA_FLAGS', ''), DEVICES)
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402
from jax.extend.mlir import ir  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# the lines of Python that each operation comes from, which take time to write into every program
jax.config.update('jax_traceback_in_locations_limit', 0)
hypothesis.settings.register_profile('moejax', derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile('moejax')


def _alone(context: ir.Context, pool):
  """MLIR's programs are lowered by one thread: with a pool, each costs time in proportion to all that are alive."""
  context.enable_multithreading(False)


_make_context = mlir.make_ir_context
_context = functools.cache(lambda thread: _make_context())


def _used_again() -> ir.Context:
  """What a thread lowers programs in, one for those of a file: to make it takes longer than to lower a small program.

  A program that is lowered while another one is has its own.
  """
  try:
    _ = ir.Context.current
  except ValueError:
    return _context(threading.get_ident())
  return _make_context()


ir.Context.set_thread_pool = _alone
mlir.make_ir_context = _used_again


def _checked_modules() -> list[str]:
  """What the import hook checks: all but the records, which transforms fill with placeholders."""
  children = sorted((ROOT / 'moejax').iterdir())
  names = [child.stem for child in children if child.is_dir() or child.suffix == '.py']
  checked = [
    f'moejax.{name}' for name in names if name not in ('arrays', '__init__', '__pycache__')
  ]
  return [*checked, 'pallas_kernels']


jaxtyping.install_import_hook(_checked_modules(), 'beartype.beartype')


def pytest_addoption(parser):
  parser.addoption(
    '--full-matrix',
    action='store_true',
    help='every router on every exchange and mesh as a whole layer, every kernel on every case in the interpreters, '
    'every program for TPUs; hours',
  )
  help = (
    'measure the properties of a router of your own: module:function, found from where pytest runs'
  )
  parser.addoption('--router', metavar='MODULE:FUNCTION', help=help)


def pytest_configure(config):
  if config.getoption('--full-matrix') and config.option.markexpr == 'not thorough':  # setup.cfg
    config.option.markexpr = ''
  _share_programs(config)
  _add_router(config)


def _share_programs(config):
  """What one file or process compiled, the others of this run read: small operations are alike in most of them."""
  if hasattr(config, 'workerinput'):  # a process of pytest-xdist
    folder = config.workerinput['programs']
  else:
    folder = tempfile.mkdtemp(prefix='programs-')
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
  settings = {
    'jax_compilation_cache_dir': folder,
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  for name, value in settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the processes that tests start


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
  node.workerinput['programs'] = jax.config.jax_compilation_cache_dir


def _add_router(config):
  """A router of one's own stands in the table of all routers while the tests run."""
  name = config.getoption('--router')
  if name is None:
    return
  sys.path.insert(0, os.getcwd())  # processes of pytest-xdist have another first entry
  from moejax import routers

  try:
    routers.ROUTERS[name] = routers.find_router(name)
  except ValueError as error:
    raise pytest.UsageError(f'--router: {error}') from error


def pytest_collection_finish():
  """Python looks for garbage among what tests made, not among what was imported, and less often than it would.

  Tracing makes so many objects that the search was a fourteenth of the suite's time; a file's garbage goes at its end.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 20)


def pytest_ignore_collect(collection_path, config):
  """With --router, the table of routers alone."""
  table = ROOT / 'tests' / 'test_every_router.py'
  if config.getoption('--router') and collection_path.is_file() and collection_path != table:
    return True
  return None


def _only(items, row):
  """Keeps the tests of this row."""
  items[:] = [
    item
    for item in items
    if getattr(item, 'callspec', None) and item.callspec.params.get('row') == row
  ]


def pytest_collection_modifyitems(config, items):
  """With --router, that row of the table of routers alone."""
  if config.getoption('--router'):
    _only(items, config.getoption('--router'))


@pytest.fixture(autouse=True)
def fixed_seeds():
  """The global generators, which other packages may draw from, start equal in every test."""
  random.seed(0)
  np.random.seed(0)  # noqa: NPY002


@pytest.fixture(autouse=True, scope='module')
def programs_do_not_pile_up():
  """Programs of one file are let go before the next one's: they hold memory, and each some tens of memory maps."""
  yield
  jax.clear_caches()
  _context.cache_clear()
  gc.collect()


@pytest.fixture
def rng() -> np.random.Generator:
  """NumPy's generator, the same in every test."""
  return np.random.default_rng(0)


@pytest.fixture
def x64():
  """float64 for one test: `@pytest.mark.usefixtures('x64')`."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def standard_promotion():
  """Relaxes dtype promotion for one test: optax.adamw multiplies weak and strong types."""
  with jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='session')
def make_mesh():
  """`make_mesh(data=2, expert=4)`: a mesh of Auto axes over the first devices."""

  def make(**axes: int) -> jax.sharding.Mesh:
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto, devices=devices)

  return make
