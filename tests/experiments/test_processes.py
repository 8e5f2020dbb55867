"""One run in several processes is the run of one process, and it ends as one."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from experiments import distributed
from experiments.checkpoint import Checkpoints
from experiments.errors import BadInput
from experiments.log import read_lines
from tests.conftest import ROOT, with_test_flags
from tests.thorough import and_thorough

SECONDS = 240  # for what takes ten on a free machine
SMALL = [
  '--config=configs/tiny.py',
  '--config.batch_size=8',
  '--config.data.sequence_length=16',
  '--config.model.d_model=16',
  '--config.model.num_layers=1',
  '--config.model.unroll=1',
  '--config.model.moe.layers=all',
  '--config.model.num_heads=2',
  '--config.model.d_ff=16',
  '--config.model.moe.d_ff=16',
  '--config.model.moe.num_experts=4',
  '--config.model.moe.router.capacity_factor=1.0',
  '--config.mesh.data=1',
  '--config.mesh.expert=4',  # two of them in each process
  '--config.optim.schedule=constant',  # a run is prolonged
  '--config.optim.warmup_steps=0',
  '--config.log.every=1',
  '--config.log.tensorboard=False',
  '--config.log.report=False',
  '--config.eval.every=0',
  '--config.eval.batches=1',
  '--config.checkpoint.every=0',
]


class Run:
  """Processes of one run, whose output is kept in files; those that still run at the end are killed."""

  def __init__(self, folder):
    self.folder, self.processes = folder, []

  def start(self, devices, *arguments, **variables):
    log = self.folder / f'log{len(self.processes)}'
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': with_test_flags('', devices),
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,  # as the tests themselves
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      **variables,
    }
    command = [sys.executable, '-m', 'experiments.train', *SMALL, *arguments]
    with log.open('w') as output:
      process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    self.processes.append(process)
    return process

  def together(self, *arguments):
    """Two processes of two devices each."""
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'--coordinator=127.0.0.1:{free.getsockname()[1]}'
    which = [[address, '--num_processes=2', f'--process_id={index}'] for index in range(2)]
    return [self.start(2, *flags, '--join_timeout=200', *arguments) for flags in which]

  def output(self, process):
    return (self.folder / f'log{self.processes.index(process)}').read_text()

  def by_slurm(self, *arguments):
    """As `together`, with what SLURM tells each of the two tasks of a step on this machine instead of flags."""
    with socket.socket() as free:  # JAX makes its port of the job's number
      free.bind(('127.0.0.1', 0))
      job = free.getsockname()[1]
    told = {'SLURM_JOB_ID': f'{job}', 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2'}
    return [
      self.start(
        2,
        '--coordinator=auto',
        '--join_timeout=200',
        *arguments,
        **told,
        SLURM_PROCID=f'{index}',
        SLURM_LOCALID=f'{index}',
        SLURM_STEP_NUM_NODES='1',
      )
      for index in range(2)
    ]

  def outputs(self):
    return '\n'.join(f'--- {one.args[-6:]}\n{self.output(one)}' for one in self.processes)

  def finish(self, *processes):
    for process in processes:
      try:
        process.wait(SECONDS)
      except subprocess.TimeoutExpired:
        pytest.fail(f'still running after {SECONDS} s:\n{self.outputs()}')
    assert [process.returncode for process in processes] == [0] * len(processes), self.outputs()

  def wait_for(self, text, process):
    self.wait_until(lambda: text in self.output(process))

  def wait_until(self, so):
    end = time.monotonic() + SECONDS
    while not so():
      alive = all(process.poll() is None for process in self.processes)
      assert alive and time.monotonic() < end, self.outputs()
      time.sleep(0.05)

  def close(self):
    for process in self.processes:
      if process.poll() is None:
        process.kill()
      process.wait()


@pytest.fixture
def run(tmp_path):
  with contextlib.closing(Run(tmp_path)) as run:
    yield run


def metrics(workdir):
  """Step -> every number of metrics.jsonl but those of the clock, as one vector by name."""
  return {
    line['step']: {k: np.asarray(v, float) for k, v in line.items() if k not in ('time', 'step')}
    for line in read_lines(workdir / 'metrics.jsonl')
  }


def leaves(workdir, step):
  """Every leaf of a checkpoint, restored in this process onto one device."""
  folder = workdir / 'checkpoints'
  described = json.loads((folder / str(step) / 'meta' / 'metadata').read_text())['leaves']
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = {
    path: jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=here)
    for path, (dtype, shape, *_) in described.items()
  }
  with Checkpoints(folder, read_only=True) as checkpoints:
    state, _ = checkpoints.restore(wanted, step)
  return {path: np.asarray(leaf) for path, leaf in state.items()}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Two processes that a signal stops and SLURM starts again, two that nobody stops, and one with all four devices."""
  folder = tmp_path_factory.mktemp('runs')
  with contextlib.closing(Run(folder)) as run:
    processes = run.together(f'--workdir={folder / "stopped"}', '--config.steps=100000')
    run.wait_for('Compiling', processes[0])  # so that few steps are done before the signal
    processes[1].send_signal(signal.SIGTERM)
    run.finish(*processes)
    done = read_lines(folder / 'stopped' / 'metrics.jsonl')[-1]['step'] + 1
    told, kept = run.output(processes[0]), list((folder / 'stopped' / 'checkpoints').iterdir())
    steps = f'--config.steps={max(done + 2, 4)}'
    saving = ['--config.checkpoint.every=4', '--config.checkpoint.keep=99']
    again = run.by_slurm(f'--workdir={folder / "stopped"}', steps)
    whole = run.together(f'--workdir={folder / "whole"}', steps, *saving)
    run.finish(*again, *whole, run.start(4, f'--workdir={folder / "one"}', '--config.steps=4'))
    outputs = [told, *map(run.output, again)]
    yield types.SimpleNamespace(folder=folder, done=done, kept=kept, outputs=outputs)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(runs):
  assert f'Stopped after step {runs.done}' in runs.outputs[0]
  assert [path.name for path in runs.kept] == [str(runs.done)]


@pytest.mark.slow
def test_what_was_stopped_goes_on_to_every_bit(runs):
  """As two processes that nobody stopped: the programs are the same, and add in the same order."""
  _, first, other = runs.outputs
  assert f'resuming at step {runs.done}' in first
  meta = json.loads((runs.kept[0] / 'meta' / 'metadata').read_text())
  # experts lie in both processes, each of which has seen to its own; the rest in either
  cut = {tuple(rest[0]) for _, _, _, *rest in meta['leaves'].values() if rest}
  assert {cuts[-3] for cuts in cut} == {4}
  assert 'step' not in other  # only the first tells
  ours, theirs = metrics(runs.folder / 'stopped'), metrics(runs.folder / 'whole')
  assert list(ours) == list(theirs) == list(range(max(runs.done + 2, 4)))
  for step in theirs:
    assert ours[step].keys() >= theirs[step].keys()  # where it was stopped it was not evaluated
    for name in theirs[step]:
      np.testing.assert_array_equal(ours[step][name], theirs[step][name], f'{name} of {step}')
  ours, theirs = (leaves(runs.folder / name, len(ours)) for name in ('stopped', 'whole'))
  assert ours.keys() == theirs.keys()
  for path in ours:
    np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.mark.slow
def test_two_processes_are_one_process(runs):
  """The same losses, routing and checkpoint for four steps; over many, a router that drops rows amplifies rounding."""
  ours, theirs = metrics(runs.folder / 'whole'), metrics(runs.folder / 'one')
  assert list(theirs) == list(range(4))
  for step in theirs:
    for name in theirs[step].keys() & ours[step].keys():  # only the last is evaluated
      np.testing.assert_allclose(
        ours[step][name], theirs[step][name], rtol=1e-6, atol=1e-9, err_msg=f'{name} of {step}'
      )
    assert {'loss', 'grad_norm'} <= theirs[step].keys() & ours[step].keys()
  ours, theirs = leaves(runs.folder / 'whole', 4), leaves(runs.folder / 'one', 4)
  assert ours.keys() == theirs.keys()
  for path in ours:
    # sums over processes add in another order: 3e-7 of the largest entry was seen
    largest = np.abs(theirs[path].astype(float)).max()
    np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=3e-6 * largest, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize('killed', and_thorough([0], [1]), ids=['the first', 'another'])
def test_when_a_process_is_killed_the_other_says_so_and_ends(run, tmp_path, killed):
  """Nothing hangs, and the code tells a launcher to start all of them again."""
  processes = run.together(f'--workdir={tmp_path}', '--config.steps=100000')
  run.wait_until((tmp_path / 'metrics.jsonl').exists)  # it trains
  processes[killed].kill()
  assert processes[1 - killed].wait(SECONDS) == 13, run.outputs()
  told = run.output(processes[1 - killed])
  assert f'process {killed} of this run has ended: start all of them again' in told, told
  assert 'Traceback' not in told


def test_a_process_that_finds_no_coordinator_says_so_and_ends(run, tmp_path):
  """Nobody listens at port 1: one sentence with the address, and the code that tells a launcher to try again."""
  flags = ['--coordinator=127.0.0.1:1', '--num_processes=2', '--process_id=1', '--join_timeout=2']
  process = run.start(1, *flags, f'--workdir={tmp_path / "new"}')
  assert process.wait(SECONDS) == 13, run.outputs()
  told = run.output(process).strip().splitlines()
  assert told[-1].startswith('--coordinator=127.0.0.1:1: the processes have not all met'), told
  assert 'Traceback' not in run.output(process)
  assert not (tmp_path / 'new').exists()


BAD = {
  'number alone': (('', 2, None), '--num_processes=2 is not accepted: it takes --coordinator'),
  'number with auto': (('auto', None, 1), '--process_id=1 is not accepted'),
  'no port': (('host', 2, 0), '--coordinator=host is not accepted: it must be HOST:PORT, or auto'),
  'no number': (('host:1', 2, None), '--coordinator=host:1 takes --num_processes=N and'),
  'too large': (('host:1', 2, 2), '--process_id=2 is not accepted: .* from 0 to 1'),
}


@pytest.mark.parametrize('case', BAD)
def test_flags_that_do_not_fit_are_refused(case):
  values, message = BAD[case]
  with pytest.raises(BadInput, match=message), distributed.joined(*values, join_timeout=1):
    pytest.fail('it was accepted')
