"""The folder of a run: locked while in use, and refused to another experiment."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from experiments import workdir as workdirs
from experiments.errors import BadInput, StorageError


def _config(**changes):
  config = common.get_config()
  config.update_from_flattened_dict(changes)
  return config.to_dict()


def _open(folder, **changes):
  config = _config(**changes)
  with workdirs.opened(folder, config):
    workdirs.write_config(folder, config)


def test_the_config_is_written_resolved_and_sorted(tmp_path):
  folder = tmp_path / 'a' / 'b'
  with workdirs.opened(folder, _config(steps=5)) as opened:
    assert opened == folder
    workdirs.write_config(folder, _config(steps=5))
  text = (folder / 'config.json').read_text()
  assert json.loads(text) == _config(steps=5)
  assert text.index('"batch_size"') < text.index('"data"') < text.index('"steps"')
  assert sorted(file.name for file in folder.iterdir()) == ['config.json', 'lock']


def test_the_same_experiment_may_be_opened_again_silently(tmp_path, capsys):
  _open(tmp_path)
  _open(tmp_path)
  assert capsys.readouterr().err == ''


def test_tuples_in_a_config_are_no_difference_to_their_json(tmp_path, capsys):
  config = _config()
  config['model']['moe']['router']['widths'] = (1, 2)
  for _ in range(2):
    with workdirs.opened(tmp_path, copy.deepcopy(config)):
      workdirs.write_config(tmp_path, copy.deepcopy(config))
  assert capsys.readouterr().err == ''


def test_a_setting_that_may_change_is_told_and_written(tmp_path, capsys):
  _open(tmp_path, steps=5)
  _open(tmp_path, **{'steps': 9, 'mesh.expert': 2})
  assert capsys.readouterr().err == (
    f'{tmp_path} goes on with mesh.expert=2, which was 1\n{tmp_path} goes on with steps=9, which was 5\n'
  )
  assert workdirs.read_json(tmp_path / 'config.json')['steps'] == 9


@pytest.mark.parametrize(
  'key, value, difference',
  [
    ('model.d_model', 256, 'model.d_model=256 here and 128 there'),
    ('model.moe.router.k', 1, 'model.moe.router.k=1 here and 2 there'),
    ('seed', 1, 'seed=1 here and 0 there'),
    ('batch_size', 64, 'batch_size=64 here and 32 there'),
    ('data.sequence_length', 64, 'data.sequence_length=64 here and 256 there'),
    ('optim.b1', 0.5, 'optim.b1=0.5 here and 0.9 there'),
    ('optim.bias_rate', 0.001, 'optim.bias_rate=0.001 here and 0.0 there'),
  ],
)
def test_another_experiment_is_refused_and_nothing_is_changed(tmp_path, key, value, difference):
  _open(tmp_path)
  before = (tmp_path / 'config.json').read_text()
  with pytest.raises(BadInput) as error:
    _open(tmp_path, **{key: value, 'steps': 3})
  assert str(error.value) == (
    f'workdir {tmp_path} holds another experiment: {difference}, '
    'which a resume may not change; give another --workdir'
  )
  assert (tmp_path / 'config.json').read_text() == before


def test_a_key_that_is_new_counts_as_a_difference(tmp_path):
  _open(tmp_path)
  config = _config()
  config['model']['moe']['router']['capacity_factor'] = 2.0
  with pytest.raises(BadInput, match="capacity_factor=2.0 here and 'absent' there"):
    with workdirs.opened(tmp_path, config):
      pass


def test_a_second_run_is_refused_while_the_first_lasts(tmp_path):
  with workdirs.opened(tmp_path, _config()):
    with pytest.raises(BadInput, match=rf'is in use by another run \(process {os.getpid()} on '):
      _open(tmp_path)
  _open(tmp_path)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
  code = (
    'import os, signal, sys\n'
    'from pathlib import Path\n'
    'from configs import common\n'
    'from experiments import workdir\n'
    'with workdir.opened(Path(sys.argv[1]), common.get_config().to_dict()):\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  done = subprocess.run([sys.executable, '-c', code, str(tmp_path)], timeout=60, check=False)
  assert done.returncode == -9
  assert 'process' in (tmp_path / 'lock').read_text()
  _open(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused_with_its_path(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(StorageError, match=f'workdir {tmp_path}/file cannot be written'):
    _open(tmp_path / 'file')
  with pytest.raises(StorageError, match=f'workdir {tmp_path}/file/deeper cannot be written'):
    _open(tmp_path / 'file' / 'deeper')


def test_an_unwritable_folder_is_refused_with_its_path(tmp_path, monkeypatch):
  def refuse(*_, **__):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(os, 'open', refuse)
  with pytest.raises(
    StorageError, match=f'workdir {tmp_path} cannot be written: Permission denied'
  ) as error:
    _open(tmp_path)
  assert error.value.exit_code == 15


def test_a_broken_config_json_is_named(tmp_path):
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(BadInput, match='config.json cannot be read as JSON'):
    _open(tmp_path)


def test_a_failed_write_leaves_the_old_text_and_no_rest(tmp_path, monkeypatch):
  file = tmp_path / 'config.json'
  workdirs.write_text(file, 'old')
  monkeypatch.setattr(
    os, 'fsync', lambda _: (_ for _ in ()).throw(OSError(28, 'No space left on device'))
  )
  with pytest.raises(StorageError, match=f'{file} cannot be written: No space left on device'):
    workdirs.write_text(file, 'new')
  assert file.read_text() == 'old'
  assert list(tmp_path.iterdir()) == [file]


def test_fresh_names_hold_no_odd_characters():
  assert workdirs.fresh('a b/../c').name.startswith('a-b-..-c-2')


def test_the_name_of_a_config_is_that_of_a_fresh_folder_at_any_hour():
  assert workdirs.config_name(workdirs.fresh('mixtral_8x7b')) == 'mixtral_8x7b'
  for clock in ('000000', '204500', '235959'):  # one begins as years do
    assert workdirs.config_name(Path(f'runs/tiny-20-20261122-{clock}')) == 'tiny-20'
  assert workdirs.config_name(Path('runs/mine')) == 'mine'
