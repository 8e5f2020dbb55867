"""The bar, the plain lines, and the speeds they tell, by a clock of our own."""

import io

import pytest

from experiments.progress import Progress, compiling


class _Clock:
  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def _progress(clock, stream, **options):
  return Progress(100, tokens_per_step=1000, clock=clock, stream=stream, **options)


def test_speeds_count_from_one_loss_to_the_next():
  clock, stream = _Clock(), io.StringIO()
  progress = _progress(clock, stream)
  clock.now += 4.0
  assert progress.update(1) == {}
  assert progress.update(2, 3.5) == {
    'seconds': 4.0,
    'seconds_per_step': 2.0,
    'tokens_per_second': 500.0,
  }
  clock.now += 10.0
  assert progress.update(12, 3.0)['tokens_per_second'] == 1000.0
  assert stream.getvalue() == (
    'step 2/100, loss 3.5000, 500 tokens/s, 3:16 left\nstep 12/100, loss 3.0000, 1k tokens/s, 1:28 left\n'
  )


def test_plain_lines_come_no_faster_than_every_five_seconds_but_the_last_always():
  clock, stream = _Clock(), io.StringIO()
  progress = _progress(clock, stream)
  for done in range(1, 101):
    clock.now += 1.0
    progress.update(done, 1.0)
  lines = stream.getvalue().splitlines()
  assert [line.split(',')[0] for line in lines[:3]] == ['step 1/100', 'step 6/100', 'step 11/100']
  assert lines[-1] == 'step 100/100, loss 1.0000, 1k tokens/s, 0:00 left'
  assert len(lines) == 21


def test_a_pause_is_no_time_of_updates():
  clock = _Clock()
  progress = _progress(clock, io.StringIO())
  clock.now += 1.0
  with progress.paused():
    clock.now += 50.0
  clock.now += 1.0
  times = progress.update(2, 1.0)
  assert (times['seconds_per_step'], times['seconds']) == (1.0, 52.0)


def test_a_resumed_run_counts_only_its_own_updates():
  clock = _Clock()
  progress = _progress(clock, io.StringIO(), done=90)
  clock.now += 5.0
  assert progress.update(95, 1.0)['seconds_per_step'] == 1.0


def test_mfu_is_told_where_the_peak_is_known_and_only_there():
  clock, stream = _Clock(), io.StringIO()
  options = {'flops_per_step': 989.5e12, 'num_devices': 4}
  known = _progress(clock, stream, device_kind='NVIDIA H200', **options)
  unknown = _progress(clock, stream, device_kind='cpu', **options)
  clock.now += 0.5
  assert known.update(1, 1.0)['mfu'] == pytest.approx(0.5)
  assert 'mfu' not in unknown.update(1, 1.0)
  first, second = stream.getvalue().splitlines()
  assert 'MFU 50.0%' in first
  assert 'MFU' not in second


def test_a_terminal_gets_a_bar_and_notes_beside_it():
  clock, stream = _Clock(), _Terminal()
  progress = _progress(clock, stream)
  clock.now += 2.0
  progress.update(50, 2.5)
  progress.note('eval loss 2.0')
  progress.close()
  text = stream.getvalue()
  assert '50/100' in text
  assert 'loss 2.5000, 25k tokens/s' in text
  assert 'eval loss 2.0\n' in text


def test_compiling_says_what_and_how_long():
  stream = io.StringIO()
  with compiling('the training step', stream):
    assert stream.getvalue() == 'Compiling the training step ...\n'
  assert stream.getvalue().splitlines()[1].startswith('Compiled the training step in 0.')
