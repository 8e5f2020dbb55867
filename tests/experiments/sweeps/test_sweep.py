"""The sweep program as a whole: every run once, failures tried again, one table."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import sweep
from experiments.errors import NonFiniteError, RunsFailed, RunStopped
from experiments.sweeps import local, plan, record, remote, worker
from experiments.sweeps.screen import Screen

ROOT = Path(__file__).resolve().parents[3]
RUNS = """[
    {'model.moe.granularity': granularity, 'seed': seed}
    for granularity, seed in ((1, 0), (2, 0), (1, 1))
  ]"""


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
  monkeypatch.chdir(ROOT)


@pytest.fixture
def file(make_sweep):
  return make_sweep(RUNS)


def rows(folder):
  with (folder / 'table.csv').open() as stream:
    return list(csv.DictReader(stream))


def main(file, folder, *arguments):
  return sweep.main(['sweep.py', f'--config={file}', f'--workdir={folder}', *arguments])


def test_every_run_is_trained_once_and_stands_in_the_table(file, tmp_path, capsys):
  """Asked for again, only what has no result is trained; its record has the time of the process before, too."""
  folder = tmp_path / 'out'
  main(file, folder, '--workers=1')
  table = rows(folder)
  assert [row['status'] for row in table] == ['finished'] * 3
  assert [(row['G'], row['seed']) for row in table] == [('1', '0'), ('2', '0'), ('1', '1')]
  assert len({row['eval_loss'] for row in table}) == 3
  # 8 experts of 2 x 8 x 16 (+ the gate's 8 x 16) weights, attention 4 x 8 x 8, norms of the block and of q and k
  assert {int(row['N']) for row in table} == {8 * 3 * 8 * 16 + 4 * 8 * 8 + 3 * 8 + 2 * 4}
  assert {int(row['D']) for row in table} == {3 * 8 * 16}
  outputs = [(folder / row['key'] / 'output.txt').read_text() for row in table]
  assert sum('Compiling the training step' in text for text in outputs) == 2  # two shapes
  before = {row['key']: (folder / row['key'] / 'result.json').stat().st_mtime_ns for row in table}
  again = folder / table[1]['key']
  (again / 'result.json').unlink()
  metrics = [json.loads(line) for line in (again / 'metrics.jsonl').read_text().splitlines()]
  metrics[-1]['time']['seconds'] = 1000.0
  (again / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in metrics))
  capsys.readouterr()
  main(file, folder, '--workers=1')
  told = capsys.readouterr().err
  assert '3/3 granularity=2 seed=0' in told
  assert 'seed=1' not in told
  assert rows(folder)[1]['eval_loss'] == table[1]['eval_loss']
  for row in (table[0], table[2]):
    assert (folder / row['key'] / 'result.json').stat().st_mtime_ns == before[row['key']]
  result = record.read_result(again)
  assert result['train_seconds'] == 1000 and 1000 < result['seconds'] < 2000


class FakeWorker:
  """Answers jobs without training; runs of seed 1 end the process the first `deaths` times."""

  deaths = 0

  def __init__(self, *arguments, **options):
    self.stdin, self.stdout, self.answer = self, self, ''

  def write(self, text):
    job = json.loads(text)
    folder = Path(job['folder'])
    folder.mkdir(parents=True, exist_ok=True)
    if job['config']['seed'] == 1 and FakeWorker.deaths:
      FakeWorker.deaths -= 1
      (folder / worker.OUTPUT).write_text('Traceback\nOSError: the disk is full\n\n')
      self.answer = ''
      return
    result = {'status': 'finished', 'eval_loss': 1.0, 'seconds': 2.0}
    record.write_result(folder, result)
    self.answer = json.dumps(result) + '\n'

  def readline(self):
    return self.answer

  def wait(self):
    return 1

  def flush(self):
    """Nothing is buffered."""

  close = terminate = flush


def test_a_run_that_fails_is_tried_once_more(file, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(local.subprocess, 'Popen', FakeWorker)
  monkeypatch.setattr(FakeWorker, 'deaths', 1)
  main(file, tmp_path / 'out', '--workers=1')
  told = capsys.readouterr().err
  assert (
    'will be tried again: granularity=1 seed=1: the process ended with code 1: OSError: the disk is full'
    in told
  )
  assert [row['status'] for row in rows(tmp_path / 'out')] == ['finished'] * 3


def test_a_run_that_fails_again_is_reported_and_the_others_are_trained(file, tmp_path, monkeypatch):
  monkeypatch.setattr(local.subprocess, 'Popen', FakeWorker)
  monkeypatch.setattr(FakeWorker, 'deaths', 2)
  with pytest.raises(
    RunsFailed, match='1 of 3 runs failed, the first: granularity=1 seed=1'
  ) as error:
    main(file, tmp_path / 'out', '--workers=2')
  assert error.value.exit_code == 17
  table = rows(tmp_path / 'out')
  assert [row['status'] for row in table] == ['finished', 'finished', 'failed']
  assert 'the disk is full' in table[2]['reason']


@pytest.mark.usefixtures('standard_promotion')
def test_a_run_that_is_stopped_has_no_result_and_goes_on_later(file, tmp_path, monkeypatch):
  (run, *_) = plan.load(str(file))
  programs = {}
  with monkeypatch.context() as asked:
    asked.setattr(
      'experiments.train.Stop.requested', True
    )  # as a signal during the first step does
    with pytest.raises(RunStopped, match='step 1 of 3'):
      worker.run(run.config, tmp_path, programs)
  assert record.read_result(tmp_path) is None
  assert (tmp_path / 'checkpoints' / '1').is_dir()
  result = worker.run(run.config, tmp_path, programs)
  assert (result['status'], result['step']) == ('finished', 2)


def test_a_run_that_diverges_before_its_first_line_is_called_diverged(file, tmp_path, monkeypatch):
  def diverges(settings, config, folder, programs):
    raise NonFiniteError('loss or gradient was not finite in 10 steps in a row')

  monkeypatch.setattr('experiments.train.train', diverges)
  (run, *_) = plan.load(str(file))
  assert worker.run(run.config, tmp_path, {})['status'] == 'diverged'
  assert record.read_result(tmp_path)['status'] == 'diverged'


SLOW_WORKER = """
import signal, sys, time
def save(number, frame):
  time.sleep(0.3)
  open(sys.argv[1], 'a').write('saved')
  sys.exit(1)
signal.signal(signal.SIGTERM, save)
sys.stdin.readline()
open(sys.argv[1], 'a').write('begun ')
time.sleep(60)
"""


@pytest.fixture
def ctrl_c():
  """Ctrl-C is heard, which shells make programs in the background ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('ctrl_c')
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_sweep_once_its_worker_has_saved(
  number, file, tmp_path, monkeypatch, capsys
):
  said, popen, workers = tmp_path / 'said', subprocess.Popen, []

  def start(command, **options):
    workers.append(popen([sys.executable, '-c', SLOW_WORKER, str(said)], **options))
    threading.Thread(target=ask_to_stop, daemon=True).start()
    return workers[-1]

  def ask_to_stop():
    while not said.is_file():
      time.sleep(0.02)
    os.kill(os.getpid(), number)

  monkeypatch.setattr(local.subprocess, 'Popen', start)
  with pytest.raises(KeyboardInterrupt):
    main(file, tmp_path / 'out', '--workers=1')
  assert said.read_text() == 'begun saved'
  assert [process.poll() for process in workers] == [1]  # no other run was begun
  assert 'failed' not in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_kept_and_called_diverged():
  assert record.status_of({'eval_loss': None}) == 'diverged'
  assert record.status_of({'eval_loss': float('nan')}) == 'diverged'
  assert record.status_of({}) == 'diverged'
  assert record.status_of({'eval_loss': 3.0}) == 'finished'


def test_workers_have_cores_of_their_own(monkeypatch):
  monkeypatch.setattr(local.os, 'sched_getaffinity', lambda _: {0, 1, 2, 3, 4})
  assert local.shares(2) == [[0, 2, 4], [1, 3]]
  assert local.shares(7) == [[0], [1], [2], [3], [4], [0], [1]]
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  assert local.default_workers() == 5


def test_time_left_is_that_of_the_finished_work(file, tmp_path):
  runs = plan.load(str(file))
  clock = iter([0.0, 30.0])
  screen = Screen(
    tmp_path, runs, lambda run: 2.0 + run.settings.seed, 1, io.StringIO(), lambda: next(clock)
  )
  assert screen.seconds_left() is None
  screen.started(runs[0])
  screen.ended(runs[0], {'status': 'finished', 'eval_loss': 1.0, 'seconds': 30.0})
  # told with the result: 2 of 7 units took 30 s
  assert (
    '1/3 granularity=1 seed=0: evaluation loss 1.0000, 30 s; 1:15 left' in screen._stream.getvalue()
  )


def test_slurm_options_come_from_the_environment(monkeypatch):
  monkeypatch.setenv('MOEJAX_SLURM', 'partition=gpu, gpus_per_node=1')
  assert remote.slurm_options() == {'slurm_partition': 'gpu', 'slurm_gpus_per_node': '1'}


# Ray leaves files of its own open
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore::ResourceWarning')
@pytest.mark.parametrize('backend', ['submitit', 'ray'])
def test_an_engine_runs_the_same_sweep_here(backend, file, tmp_path):
  """Both engines for real, in their local modes."""
  pytest.importorskip(backend, reason=f'needs the extra that installs {backend}')
  folder = tmp_path / 'out'
  main(file, folder, '--workers=1', f'--backend={backend}', '--config.steps=2')
  assert [row['status'] for row in rows(folder)] == ['finished'] * 3


def test_the_time_of_a_resumed_run_is_that_of_all_its_processes():
  def lines(*clock):
    return [{'step': step, 'time': {'seconds': seconds}} for step, seconds in enumerate(clock)]

  assert worker.seconds_told([]) == 0
  assert worker.seconds_told(lines(1.0, 2.0, 3.0)) == 3
  assert worker.seconds_told(lines(1.0, 9.0, 4.0, 5.0, 2.0)) == 9 + 5 + 2
