"""Checkpoints restore to every bit, or are refused and set aside; nothing broken is ever taken for good."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.checkpoint import Checkpoints
from experiments.errors import BadInput, DataError, StorageError

# A restore that fails in Orbax leaves callbacks for an event loop that it has closed; they do nothing.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


def _state(seed):
  keys = jax.random.split(jax.random.key(seed), 2)
  return {
    'step': jnp.int32(seed),
    'params': {
      'w': jax.random.normal(keys[0], (16, 8)),
      'half': jax.random.normal(keys[1], (8, 4), jnp.bfloat16),
    },
    'opt_state': (_Adam(jnp.int32(seed), jnp.ones((16, 8))), ()),
    'nothing': jnp.zeros((0, 3)),
  }


@jax.tree_util.register_pytree_with_keys_class
class _Adam:
  """Some optimizer's record, which the file must not know."""

  def __init__(self, count, mu):
    self.count, self.mu = count, mu

  def tree_flatten_with_keys(self):
    key = jax.tree_util.GetAttrKey
    return [(key('count'), self.count), (key('mu'), self.mu)], None

  @classmethod
  def tree_unflatten(cls, _, leaves):
    return cls(*leaves)


def _abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _assert_equal(state, expected):
  assert jax.tree.structure(state) == jax.tree.structure(expected)
  for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
    assert one.dtype == other.dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A folder with checkpoints 1 and 2, to be copied."""
  folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
  with Checkpoints(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, _state(step), {'config': {'steps': 9}, 'data': {'sha256': 'ab'}})
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / 'checkpoints')


def test_the_newest_restores_to_every_bit_with_what_it_was_saved_with(folder):
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    state, meta = checkpoints.restore(_abstract(_state(0)))
  _assert_equal(state, _state(2))
  assert (meta['step'], meta['config'], meta['data']) == (2, {'steps': 9}, {'sha256': 'ab'})
  assert meta['versions']['jax'] == jax.__version__
  assert meta['leaves']['params/half'][:2] == ['bfloat16', [8, 4]]
  assert meta['leaves']['step'][:2] == ['int32', []]


def test_a_given_step_restores(folder):
  with Checkpoints(folder) as checkpoints:
    state, _ = checkpoints.restore(_abstract(_state(0)), step=1)
    _assert_equal(state, _state(1))
    with pytest.raises(BadInput, match=re.escape('has no checkpoint 5: it has [1, 2]')):
      checkpoints.restore(_abstract(_state(0)), step=5)


def test_an_empty_folder_is_a_start_from_scratch(tmp_path):
  with Checkpoints(tmp_path / 'a' / 'b') as checkpoints:
    assert checkpoints.restore(_abstract(_state(0))) is None


def test_it_restores_onto_another_mesh(folder):
  def abstract(devices):
    mesh = jax.make_mesh((devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    spread = lambda x: NamedSharding(mesh, P('data') if x.ndim == 2 and x.shape[0] else P())
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread(x)), _state(0)
    )

  devices = jax.device_count()
  with Checkpoints(folder) as checkpoints:
    state, _ = checkpoints.restore(abstract(devices))
    _assert_equal(state, _state(2))
    assert len(state['params']['w'].sharding.device_set) == devices
    checkpoints.save(3, state, {})
    again, _ = checkpoints.restore(_abstract(_state(0)), step=3)
    _assert_equal(again, _state(2))


def test_only_the_newest_are_kept(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    for step in range(4):
      checkpoints.save(step, _state(step), {})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 3]


def test_saving_a_step_twice_saves_it_once_and_an_older_step_is_refused(folder):
  with Checkpoints(folder) as checkpoints:
    checkpoints.save(3, _state(3), {})
    checkpoints.save(3, _state(3), {})
    with pytest.raises(StorageError, match=re.escape('/1 was refused: the folder has [2, 3]')):
      checkpoints.save(1, _state(1), {})


def test_donated_buffers_do_not_reach_the_file(tmp_path):
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  state = {'w': jnp.arange(4096.0)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state, {})
    state = {'w': overwrite(state['w'])}
    restored, _ = checkpoints.restore(_abstract(state))
  np.testing.assert_array_equal(restored['w'], np.arange(4096.0))


@pytest.mark.parametrize(
  'change, sentence',
  [
    (
      lambda s: s['params'].update(w=jnp.zeros((16, 9))),
      'params/w is float32(16, 8) there and float32(16, 9) here',
    ),
    (
      lambda s: s['params'].update(w=jnp.zeros((16, 8), jnp.int32)),
      'params/w is float32(16, 8) there and int32(16, 8) here',
    ),
    (
      lambda s: s['params'].update(new=jnp.zeros(3)),
      'params/new is absent there and float32(3,) here',
    ),
    (lambda s: s['params'].pop('w'), 'params/w is float32(16, 8) there and absent here'),
  ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_difference(folder, change, sentence):
  state = _state(0)
  change(state)
  with Checkpoints(folder) as checkpoints:
    with pytest.raises(BadInput) as error:
      checkpoints.restore(_abstract(state))
    assert str(error.value) == f'{folder}/2 is of another model: {sentence}'
    assert checkpoints.steps() == [1, 2]  # nobody's fault: nothing is set aside


def _files(folder):
  return sorted(file for file in folder.rglob('*') if file.is_file() and file.stat().st_size)


def _flip(file, place):
  data = bytearray(file.read_bytes())
  data[int(place * len(data))] ^= 0x10
  file.write_bytes(bytes(data))


def test_one_flipped_bit_in_any_file_is_never_taken_for_a_weight(saved, tmp_path, capsys):
  outcomes = set()
  for index, name in enumerate(file.relative_to(saved) for file in _files(saved / '2')):
    copy = shutil.copytree(saved, tmp_path / str(index))
    _flip(copy / name, (0.31, 0.55, 0.78)[index % 3])
    with Checkpoints(copy) as checkpoints:
      state, meta = checkpoints.restore(_abstract(_state(0)))
    _assert_equal(state, _state(meta['step']))
    outcomes.add(meta['step'])
    corrupt = f'checkpoint {copy}/2 is corrupt (' in capsys.readouterr().err
    assert corrupt == (meta['step'] == 1) == (copy / '2.corrupt').exists(), name
  assert outcomes == {1, 2}  # some files, such as the sharding's, do not matter


@pytest.mark.parametrize('damage', ['truncated', 'zeroed', 'deleted'])
def test_damaged_array_files_fall_back_to_the_step_before(folder, capsys, damage):
  for file in (file for file in _files(folder / '2' / 'state') if file.parent.name == 'd'):
    if damage == 'deleted':
      file.unlink()
    else:
      data = file.read_bytes()
      half = data[: len(data) // 2]
      file.write_bytes(half if damage == 'truncated' else half + bytes(len(data) - len(half)))
  with Checkpoints(folder) as checkpoints:
    state, _ = checkpoints.restore(_abstract(_state(0)))
    _assert_equal(state, _state(1))
    told = capsys.readouterr().err
    assert re.search(
      rf'^checkpoint {folder}/2 is corrupt \(.*\), trying the one before$', told, re.M
    )
    assert 'tensorstore_spec' not in told
    checkpoints.save(2, _state(5), {})  # the step is free again
    again, _ = checkpoints.restore(_abstract(_state(0)))
    _assert_equal(again, _state(5))


def test_a_changed_meta_is_found(folder, capsys):
  file = next(file for file in _files(folder / '2' / 'meta') if b'"steps"' in file.read_bytes())
  values = json.loads(file.read_text())
  values['config']['steps'] = 10
  file.write_text(json.dumps(values))
  with Checkpoints(folder) as checkpoints:
    _, meta = checkpoints.restore(_abstract(_state(0)))
  assert meta['step'] == 1
  assert 'meta does not have its digest' in capsys.readouterr().err


def test_when_nothing_restores_the_run_does_not_start_from_scratch(folder):
  for step in (1, 2):
    shutil.rmtree(folder / str(step) / 'state')
  for _ in range(2):  # nor at the second attempt, when both were set aside
    with (
      Checkpoints(folder) as checkpoints,
      pytest.raises(DataError, match=f'no checkpoint in {folder} can be restored') as error,
    ):
      checkpoints.restore(_abstract(_state(0)))
    assert error.value.exit_code == 16
  assert sorted(path.name for path in folder.iterdir()) == ['1.corrupt', '2.corrupt']


@pytest.mark.parametrize(
  'error',
  [OSError(errno.ESTALE, os.strerror(errno.ESTALE)), ValueError('UNAVAILABLE: no answer')],
  ids=['a stale handle', 'no server'],
)
def test_checkpoints_that_cannot_be_reached_now_are_not_called_corrupt(folder, monkeypatch, error):
  """The next start goes on from the newest one."""

  def fail(*_, **__):
    raise error

  with Checkpoints(folder) as checkpoints:
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints._manager, 'restore', fail)
      with pytest.raises(StorageError, match=f'checkpoint {folder}/2 cannot be read now: '):
        checkpoints.restore(_abstract(_state(0)))
    state, _ = checkpoints.restore(_abstract(_state(0)))
    _assert_equal(state, _state(2))


def test_a_reader_changes_nothing(folder, caplog):
  shutil.rmtree(folder / '2' / 'state')
  (folder / '3.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(folder, read_only=True) as checkpoints:
    state, _ = checkpoints.restore(_abstract(_state(0)))
    _assert_equal(state, _state(1))
  assert sorted(path.name for path in folder.iterdir()) == ['1', '2', '3.orbax-checkpoint-tmp']
  assert 'CheckpointManagerOptions' not in caplog.text


def test_what_a_killed_save_left_is_removed(folder):
  (folder / '3.orbax-checkpoint-tmp').mkdir()
  with Checkpoints(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2]
  assert sorted(path.name for path in folder.iterdir()) == ['1', '2']


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(StorageError, match=f'checkpoints {tmp_path}/file cannot be written'):
    Checkpoints(tmp_path / 'file')


def test_a_leaf_without_devices_to_go_to_is_named(folder):
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _state(0))
  with (
    Checkpoints(folder) as checkpoints,
    pytest.raises(ValueError, match='nothing has no sharding'),
  ):
    checkpoints.restore(abstract)


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax
from experiments.checkpoint import Checkpoints
from experiments.errors import StorageError

state = {'w': jax.random.normal(jax.random.key(0), (300, 400))}
checkpoints = Checkpoints(Path(sys.argv[1]))
checkpoints.save(1, state, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
try:
  checkpoints.save(2, state, {})
  checkpoints.wait()
except StorageError as error:
  print(error)
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, -1))
  assert checkpoints.steps() == [1]
  assert (checkpoints.restore(state)[0]['w'] == state['w']).all()
  sys.exit(error.exit_code)
"""


def test_a_full_disk_is_told_and_leaves_the_checkpoints_before(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', _FULL_DISK, str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 15, done.stderr
  assert done.stdout.startswith(f'checkpoint {tmp_path}/2 was not saved: ')
  assert [path.name for path in tmp_path.iterdir()] == ['1']
