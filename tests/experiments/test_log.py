"""metrics.jsonl: every step once, whatever was killed; TensorBoard: never in the way."""

import contextlib
import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from experiments.errors import StorageError
from experiments.log import JsonLines, TensorBoard, make_writer, read_lines
from experiments.settings import Settings


def _write(file, first, last, restored=0, seconds=1.0):
  writer = JsonLines(file, restored)
  for step in range(first, last):
    writer.write(step, {'loss': 5.0 / (step + 1)}, {'seconds': seconds})
  writer.close()


def test_a_line_holds_numbers_vectors_and_tables(tmp_path):
  file = tmp_path / 'metrics.jsonl'
  writer = JsonLines(file)
  metrics = {
    'loss': jnp.float32(0.1),
    'skipped': np.int32(3),
    'entropy': jnp.array([0.5, 0.25], jnp.bfloat16),
    'load': np.full((2, 2), 0.5, np.float32),
    'wide': np.float64(0.1),
    'note': 'x',
    'bad': jnp.float32(np.nan),
  }
  writer.write(7, metrics, {'seconds': 1.5})
  # readable at once, without close
  assert json.loads(file.read_text()) == {
    'step': 7,
    'loss': 0.1,
    'skipped': 3,
    'entropy': [0.5, 0.25],
    'load': [[0.5, 0.5], [0.5, 0.5]],
    'wide': 0.1,
    'note': 'x',
    'bad': None,
    'time': {'seconds': 1.5},
  }
  writer.close()


def test_float32_keeps_every_bit_with_few_digits(tmp_path):
  values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
  writer = JsonLines(tmp_path / 'm')
  writer.write(0, {'x': values})
  writer.close()
  back = np.array(read_lines(tmp_path / 'm')[0]['x'], np.float32)
  np.testing.assert_array_equal(back, values)


def test_a_killed_and_resumed_file_equals_the_unbroken_one_but_for_time(tmp_path):
  _write(tmp_path / 'unbroken', 0, 10)
  _write(tmp_path / 'killed', 0, 7, seconds=2.0)  # killed after step 6; the checkpoint is of step 5
  with (tmp_path / 'killed').open('a') as file:
    file.write('{"step": 7, "lo')  # the line being written
  _write(tmp_path / 'killed', 5, 10, restored=5, seconds=3.0)
  unbroken, killed = (
    [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    for name in ('unbroken', 'killed')
  )
  assert [line.pop('time')['seconds'] for line in killed] == [2.0] * 5 + [3.0] * 5
  for line in unbroken:
    line.pop('time')
  assert killed == unbroken


def test_a_start_from_scratch_empties_the_file(tmp_path):
  _write(tmp_path / 'm', 0, 4)
  _write(tmp_path / 'm', 0, 2)
  assert [line['step'] for line in read_lines(tmp_path / 'm')] == [0, 1]


def test_an_unwritable_file_is_named(tmp_path):
  with pytest.raises(StorageError, match=f'{tmp_path}/no/m cannot be written: No such file'):
    JsonLines(tmp_path / 'no' / 'm')


class _Full(io.RawIOBase):
  def writable(self):
    return True

  def write(self, _):
    raise OSError(28, 'No space left on device')


def test_a_full_disk_is_told(tmp_path):
  """And not once more when the run closes the file, which still has the line in its buffer."""
  writer = JsonLines(tmp_path / 'm')
  writer._stream.close()
  writer._stream = io.TextIOWrapper(io.BufferedWriter(_Full()))
  with pytest.raises(StorageError, match=f'{tmp_path}/m cannot be written: No space left'):
    with contextlib.closing(writer):
      writer.write(0, {'loss': 1.0})


def _events(folder):
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import RecordWriter  # noqa: F401, the format's home

  events = []
  for file in sorted(folder.iterdir()):
    data = file.read_bytes()
    while data:  # length u64, its crc u32, the event, its crc u32
      length = int.from_bytes(data[:8], 'little')
      events.append(Event.FromString(data[12 : 12 + length]))
      data = data[16 + length :]
  return events


def test_tensorboard_has_scalars_and_vectors_and_no_tables(tmp_path):
  board = TensorBoard(tmp_path / 'tb')
  board.write(
    3, {'loss': 2.0, 'entropy': [0.5, 0.25], 'load': np.ones((2, 2)), 'note': 'x'}, {'s': 4.0}
  )
  board.close()
  values = {
    value.tag: (event.step, value.simple_value)
    for event in _events(tmp_path / 'tb')
    for value in event.summary.value
  }
  assert values == {
    'loss': (3, 2.0),
    'entropy/0': (3, 0.5),
    'entropy/1': (3, 0.25),
    'time/s': (3, 4.0),
  }


def test_a_resumed_board_tells_readers_to_drop_later_steps(tmp_path):
  board = TensorBoard(tmp_path / 'tb', restored_step=5)
  board.close()
  assert [(event.step, event.session_log.status) for event in _events(tmp_path / 'tb')][1:] == [
    (5, 1)
  ]


def test_a_broken_board_is_told_once_and_stops_nothing(tmp_path, capsys):
  board = TensorBoard(tmp_path / 'tb')

  def fail(_):
    raise OSError(28, 'No space left on device')

  board._events.write_event = fail
  for step in range(3):
    board.write(step, {'loss': 1.0})
  board.close()
  told = capsys.readouterr().err
  assert (
    told
    == f'TensorBoard in {tmp_path}/tb is off from here on: [Errno 28] No space left on device\n'
  )


def test_a_board_that_cannot_be_opened_stops_nothing(tmp_path, capsys):
  (tmp_path / 'tensorboard').write_text('')
  writer = make_writer(tmp_path, Settings.from_config(common.get_config()).log)
  writer.write(0, {'loss': 1.0})
  writer.close()
  assert capsys.readouterr().err.count('is off from here on') == 1
  assert read_lines(tmp_path / 'metrics.jsonl') == [{'step': 0, 'loss': 1.0}]


def test_tensorboard_can_be_switched_off(tmp_path):
  log = dataclasses.replace(Settings.from_config(common.get_config()).log, tensorboard=False)
  writer = make_writer(tmp_path, log)
  writer.write(0, {'loss': 1.0})
  writer.close()
  assert [file.name for file in tmp_path.iterdir()] == ['metrics.jsonl']
