"""The training program as a whole: it learns, resumes to the bit, and refuses what cannot be run."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import common
from experiments import evaluate, placement, train, workdir
from experiments.errors import BadInput, DataError, StorageError
from experiments.log import read_lines

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
  '--config=configs/tiny.py',
  '--config.steps=12',
  '--config.batch_size=8',
  '--config.data.sequence_length=32',
  '--config.model.d_model=16',
  '--config.model.num_layers=2',
  '--config.model.num_heads=2',
  '--config.model.d_ff=16',
  '--config.model.moe.d_ff=16',
  '--config.model.moe.num_experts=4',
  '--config.log.every=1',
  '--config.eval.every=6',
  '--config.eval.batches=2',
  '--config.checkpoint.every=3',
  '--config.log.tensorboard=False',
]

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


def run(workdir, *arguments):
  return train.main(['train.py', *SMALL, f'--workdir={workdir}', *arguments])


def lines(workdir):
  """metrics.jsonl without what depends on the clock."""
  return [
    {k: v for k, v in line.items() if k != 'time'} for line in read_lines(workdir / 'metrics.jsonl')
  ]


def refuse_data(*_):
  raise DataError('other data')


def digests(workdir, step):
  """sha256 of every leaf of the state after `step` steps."""
  meta = workdir / 'checkpoints' / str(step) / 'meta' / 'metadata'
  return json.loads(meta.read_text())['leaves']


def test_a_run_that_breaks_and_is_started_again_is_the_unbroken_run(tmp_path, monkeypatch):
  """An error at step 7, a checkpoint at 6: every later number and every bit of the state is as if nothing had been."""
  run(tmp_path / 'whole')
  place, calls = train.place_batch, []

  def break_at_7(mesh, batch):
    calls.append(batch)
    if len(calls) == 8:
      raise RuntimeError('the power is gone')
    return place(mesh, batch)

  with monkeypatch.context() as patch:
    patch.setattr(train, 'place_batch', break_at_7)
    with pytest.raises(RuntimeError, match='the power is gone'):
      run(tmp_path / 'broken')
  assert len(lines(tmp_path / 'broken')) == 7
  run(tmp_path / 'broken')
  assert lines(tmp_path / 'broken') == lines(tmp_path / 'whole')
  assert [line['step'] for line in lines(tmp_path / 'whole')] == list(range(12))
  assert digests(tmp_path / 'broken', 12) == digests(tmp_path / 'whole', 12)
  rates = [line['learning_rate'] for line in lines(tmp_path / 'whole')]
  assert rates == [float(str(np.float32(rate))) for rate in rates]  # no digits that it has not
  report = (tmp_path / 'whole' / 'report.html').read_text()
  assert '<svg' in report
  assert 'http' not in report.replace('http://www.w3.org', '')  # self-contained

  # the same folder refuses other data and another model, and says which key
  with pytest.raises(BadInput, match='model.d_ff=32 here and 16 there'):
    run(tmp_path / 'whole', '--config.model.d_ff=32')
  with pytest.raises((BadInput, DataError), match='seed'):
    run(tmp_path / 'whole', '--config.seed=1')
  assert lines(tmp_path / 'whole') == lines(tmp_path / 'broken')

  # a resume that other data of the same name refuse leaves the settings that go on
  settings = (tmp_path / 'whole' / 'config.json').read_text()
  with monkeypatch.context() as patch:
    patch.setattr(train, 'check_fingerprint', refuse_data)
    with pytest.raises(DataError, match='other data'):
      run(tmp_path / 'whole', '--config.steps=20')
  assert (tmp_path / 'whole' / 'config.json').read_text() == settings


@pytest.mark.slow
def test_killed_and_stopped_and_started_again_is_the_unbroken_run(tmp_path):
  """SIGKILL while it trains, then SIGTERM while it trains, then to the end: in processes of their own.

  Compiled as users compile, once: all read the programs of the first.
  """
  steps = ['--config.steps=40', '--config.checkpoint.every=5']

  def start(workdir):
    command = [sys.executable, '-m', 'experiments.train', *SMALL, *steps, f'--workdir={workdir}']
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

  def wait_until(so, process):
    while not so():
      assert process.poll() is None, process.stderr.read()
      time.sleep(0.01)

  process = start(tmp_path / 'whole')
  _, errors = process.communicate()
  assert process.returncode == 0, errors

  broken = tmp_path / 'broken'
  process = start(broken)
  wait_until((broken / 'checkpoints' / '5').exists, process)
  process.kill()
  process.communicate()
  assert process.returncode == -signal.SIGKILL

  process = start(broken)
  wait_until(lambda: len(read_lines(broken / 'metrics.jsonl')) >= 14, process)
  process.terminate()
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  assert 'resuming at step' in errors

  process = start(broken)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  assert lines(broken) == lines(tmp_path / 'whole')
  assert digests(broken, 40) == digests(tmp_path / 'whole', 40)


BAD = {
  'misspelt key': (['--config.modle.d_model=8'], 'modle.d_model.* did you mean'),
  'wrong type': (['--config.steps=many'], "steps='many' is not accepted: it must be an integer"),
  'k above E': (['--config.model.moe.router.k=5'], r'router\.k=5 .* from 1 to .*num_experts=4'),
  'experts over the mesh': (
    ['--config.mesh.expert=8', '--config.mesh.data=1'],
    'num_experts=4 does not divide over mesh axis expert=8',
  ),
  'batch over the mesh': (
    ['--config.batch_size=12'],
    'batch_size=12 .* does not divide over the 8 devices',
  ),
  'mesh over the devices': (
    ['--config.mesh.data=3'],
    'does not fit 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8 in the environment',
  ),
  'leaking router': (
    ["--config.model.moe.router={'name': 'expert_choice'}"],
    "lets a token see later ones.*accepted are model.moe.router.group='position', or allow_leak=True",
  ),
  'leaking capacity': (
    ['--config.model.moe.router.capacity_factor=1.0', '--config.model.moe.router.priority=score'],
    "lets a token see later ones.*priority='token_major'",
  ),
  'negative size': (['--config.model.d_model=-8'], 'model.d_model=-8 .* at least 1'),
  'unknown data': (['--config.data.name=wiki7'], 'wiki7.*wiki6'),
  'unknown router': (
    ["--config.model.moe.router={'name': 'topk'}"],
    "router name='topk': accepted are .*; did you mean 'top_k'",
  ),
  'unknown option': (
    ['--config.model.moe.router.capacity_facter=1.0'],
    "option 'capacity_facter' of router 'top_k'.*did you mean 'capacity_factor'",
  ),
  'dead router': (
    ['--config.model.moe.router.k=1', '--config.model.moe.router.weighting=softmax_topk_norm'],
    "makes every weight 1 and the router's gradient zero",
  ),
  'nothing to balance': (['--config.optim.bias_rate=0.001'], 'bias_rate=0.001 .* without a bias'),
  'unknown schedule': (['--config.optim.schedule=cosin'], "schedule='cosin'.*cosine, trapezoid"),
  'unknown loss': (
    ['--config.model.moe.losses.balanse=1.0'],
    "loss 'balanse': accepted are .*balance",
  ),
  'no such config': (['--config=configs/none.py'], 'there is no file configs/none.py'),
  'not a config': (['--config=experiments/place.py'], 'has no function get_config'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(case, tmp_path):
  arguments, message = BAD[case]
  with pytest.raises(BadInput, match=message) as caught:
    run(tmp_path / 'new', *arguments)
  assert caught.value.exit_code == 2
  assert '\n' not in str(caught.value)
  assert not (tmp_path / 'new').exists()


def _a_file(folder):
  folder.write_text('')
  return StorageError, 15, f'workdir {folder}/run cannot be written: Not a directory'


def _of_another_model(folder):
  config = common.get_config().to_dict()
  with workdir.opened(folder / 'run', config):
    workdir.write_config(folder / 'run', config)
  return BadInput, 2, f'workdir {folder}/run holds another experiment: batch_size=8 here and 32'


def _in_use(folder):
  done = _of_another_model(folder)
  lock = os.open(folder / 'run' / 'lock', os.O_RDWR)  # for as long as this process lives
  fcntl.flock(lock, fcntl.LOCK_EX)
  return *done[:2], f'workdir {folder}/run is in use by another run'


@pytest.mark.parametrize('spoil', [_a_file, _of_another_model, _in_use])
def test_a_bad_workdir_is_refused_before_data_are_opened_and_left_as_it_is(
  spoil, tmp_path, monkeypatch
):
  kind, code, message = spoil(tmp_path / 'folder')
  monkeypatch.setattr(train, 'assemble', lambda *_: pytest.fail('data were opened'))
  before = {file: file.is_file() and file.read_text() for file in tmp_path.rglob('*')}
  with pytest.raises(kind, match=re.escape(message)) as caught:
    run(tmp_path / 'folder' / 'run')
  assert caught.value.exit_code == code
  assert {file: file.is_file() and file.read_text() for file in tmp_path.rglob('*')} == before


def test_a_good_workdir_is_not_made_before_data_are_opened(tmp_path, monkeypatch):
  def no_data(*_):
    raise DataError('no data')

  monkeypatch.setattr(train, 'assemble', no_data)
  with pytest.raises(DataError, match='no data'):
    run(tmp_path / 'new' / 'run')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('program', [evaluate, placement])
def test_a_workdir_without_checkpoint_is_refused_before_data_are_opened(
  program, tmp_path, monkeypatch
):
  monkeypatch.setattr(program, 'assemble', lambda *_: pytest.fail('data were opened'))
  with pytest.raises(BadInput, match=f'--workdir={tmp_path} has no checkpoint'):
    program.main(['', *SMALL, f'--workdir={tmp_path}'])


def test_a_signal_may_come_while_its_handler_is_installed(monkeypatch):
  install, before = signal.signal, signal.getsignal(signal.SIGTERM)

  def install_and_send(number, handler):
    was = install(number, handler)
    if number == signal.SIGTERM and handler != before:
      signal.raise_signal(number)
    return was

  with monkeypatch.context() as patch:
    patch.setattr(signal, 'signal', install_and_send)
    with train.stop_requested() as stop:
      assert stop.requested
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_stopped_before_its_first_line_ends_well_and_goes_on(tmp_path, monkeypatch):
  monkeypatch.setattr(train.Stop, 'after', lambda self, done: True)
  small = ('--config.model.moe.layers=none', '--config.model.num_layers=1', '--config.log.every=2')
  assert run(tmp_path / 'run', *small) == 0
  assert digests(tmp_path / 'run', 1)
  assert not (tmp_path / 'run' / 'report.html').exists()
  assert run(tmp_path / 'run', *small) == 0
  assert [line['step'] for line in lines(tmp_path / 'run')] == [1]
  assert (tmp_path / 'run' / 'report.html').exists()


def test_a_leak_that_is_asked_for_is_trained(tmp_path, capsys):
  """allow_leak=True: the demonstration of the leak needs it. Evaluation keeps its own time, whatever the log does."""
  settings = (
    "--config.model.moe.router={'name': 'expert_choice'}",
    '--config.allow_leak=True',
    '--config.steps=5',
    '--config.log.every=4',
    '--config.eval.every=3',
  )
  run(tmp_path / 'leak', *settings)
  told = re.findall(r'(step .*), evaluation: loss ([\d.]+), accuracy', capsys.readouterr().err)
  found = [f'{line["eval_loss"]:.4f}' for line in lines(tmp_path / 'leak') if 'eval_loss' in line]
  assert told == [('step 3/5', found[0]), ('step 5/5', found[1])]
  run(tmp_path / 'leak', *settings)
  assert 'all 5 steps are done (more: --config.steps=N); ' in capsys.readouterr().err
  evaluated = {line['step']: 'eval_loss' in line for line in lines(tmp_path / 'leak')}
  assert evaluated == {2: True, 3: False, 4: True}
