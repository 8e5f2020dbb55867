"""One run in several processes is the run of one process, and it ends as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import distributed
from experiments.checkpoint import Checkpoints
from experiments.errors import BadInput
from experiments.log import read_lines

ROOT = Path(__file__).resolve().parents[2]
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

  def start(self, devices, *arguments):
    log = self.folder / f'log{len(self.processes)}'
    environment = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0',
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
    end = time.monotonic() + SECONDS
    while text not in self.output(process):
      alive = all(process.poll() is None for process in self.processes)
      assert alive and time.monotonic() < end, self.outputs()
      time.sleep(0.05)


@pytest.fixture
def run(tmp_path):
  run = Run(tmp_path)
  yield run
  for process in run.processes:
    if process.poll() is None:
      process.kill()
    process.wait()


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
    for path, (dtype, shape, _) in described.items()
  }
  with Checkpoints(folder, read_only=True) as checkpoints:
    state, _ = checkpoints.restore(wanted, step)
  return {path: np.asarray(leaf) for path, leaf in state.items()}


@pytest.mark.slow
def test_two_processes_ended_and_started_again_are_one_process(run, tmp_path):
  """Two processes of two devices end, go on and end; one process of four devices runs through: the same losses,
  routing and checkpoint."""
  two, one = tmp_path / 'two', tmp_path / 'one'
  run.finish(*run.together(f'--workdir={two}', '--config.steps=2'))
  processes = run.together(f'--workdir={two}', '--config.steps=4')
  run.finish(*processes, run.start(4, f'--workdir={one}', '--config.steps=4'))
  assert 'resuming at step 2' in run.output(processes[0]), run.outputs()
  assert 'step' not in run.output(processes[1])  # only the first tells
  ours, theirs = metrics(two), metrics(one)
  assert list(ours) == list(theirs) == list(range(4))
  for step in ours:
    # what ended in between was evaluated there, too
    assert ours[step].keys() >= theirs[step].keys()
    for name in theirs[step]:
      np.testing.assert_allclose(
        ours[step][name], theirs[step][name], rtol=1e-6, atol=1e-9, err_msg=f'{name} of {step}'
      )
  ours, theirs = leaves(two, 4), leaves(one, 4)
  assert ours.keys() == theirs.keys()
  for path in ours:
    # sums over processes add in another order: 3e-7 of the largest entry was seen
    largest = np.abs(theirs[path].astype(float)).max()
    np.testing.assert_allclose(ours[path], theirs[path], rtol=0, atol=3e-6 * largest, err_msg=path)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step(run, tmp_path):
  processes = run.together(f'--workdir={tmp_path / "two"}', '--config.steps=100000')
  run.wait_for('Compiling', processes[0])  # so that few steps are done before the signal
  processes[1].send_signal(signal.SIGTERM)
  run.finish(*processes)
  stopped = read_lines(tmp_path / 'two' / 'metrics.jsonl')[-1]['step'] + 1
  assert f'Stopped after step {stopped}' in run.output(processes[0]), run.outputs()
  assert [path.name for path in (tmp_path / 'two' / 'checkpoints').iterdir()] == [str(stopped)]


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
