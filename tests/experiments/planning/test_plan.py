"""The program: what it prints, writes and refuses."""

import dataclasses
from pathlib import Path

import pytest

from configs.scale import mixtral_8x7b
from experiments import plan
from experiments.errors import BadInput, StorageError
from experiments.planning.report import notes
from experiments.planning.tensors import tensors
from experiments.planning.workload import Layout, workload
from experiments.settings import Settings

CONFIG = str(Path(__file__).resolve().parents[3] / 'configs/scale/mixtral_8x7b.py')
TINY = str(Path(__file__).resolve().parents[3] / 'configs/tiny.py')


def run(capsys, *arguments):
  assert plan.main(['plan', '--config', CONFIG, *arguments]) == 0
  return capsys.readouterr().out


def test_the_plan_ends_in_lines_to_paste_and_a_page(capsys, tmp_path):
  page = tmp_path / 'plan.html'
  out = run(capsys, '--topology=h100:8x16', f'--page={page}', '--top=3')
  assert 'mixtral_8x7b: 46,702,792,704 parameters' in out
  lines = [line.rstrip(' \\') for line in out.splitlines() if line.startswith('--config.')]
  keys = [line.partition('=')[0] for line in lines]
  assert keys[:3] == ['--config.mesh.data', '--config.mesh.fsdp', '--config.mesh.expert']
  text = page.read_text(encoding='utf-8')
  assert '<h1>mixtral_8x7b on h100:8x16</h1>' in text
  assert lines[0] in text
  assert 'http' not in text.replace('http-equiv', '')
  # what it says to paste is itself a plan
  again = run(capsys, '--topology=h100:8x16', f'--page={page}', '--layout=config', *lines)
  best = next(
    line for line in out.splitlines() if line.startswith('fsdp') or line.startswith('data')
  )
  assert best.split('  ')[0] in again


@pytest.mark.parametrize(
  ('exchange', 'mesh', 'wanted'),
  [
    ('bilevel', ('fsdp=16', 'expert=8'), ('nodes=4', 'capacity_factor=1.5')),
    ('sparse_fsdp', ('fsdp=32', 'expert=4'), ('hot=2', 'capacity_factor=1.0')),
    ('ragged_fallback', ('fsdp=32', 'expert=4'), ('buffer_factor=1.5',)),
  ],
)
def test_lines_to_paste_hold_the_options_of_the_exchange(capsys, tmp_path, exchange, mesh, wanted):
  given = {
    'bilevel': ('nodes=4', 'capacity_factor=1.5'),
    'sparse_fsdp': ('hot=2',),
    'ragged_fallback': (),
  }[exchange]
  moe = '--config.model.moe.exchange'
  out = run(
    capsys,
    '--topology=h200:8x16',
    f'--page={tmp_path / "plan.html"}',
    '--layout=config',
    '--config.mesh.data=1',
    *(f'--config.mesh.{axis}' for axis in mesh),
    f'{moe}={exchange}',
    *(f'{moe}_options.{option}' for option in given),
  )
  lines = [line.rstrip(' \\') for line in out.splitlines() if line.startswith(moe)]
  assert lines == [f'{moe}={exchange}', *(f'{moe}_options.{option}' for option in wanted)]


def test_sharding_is_not_checked_and_says_so():
  with pytest.raises(BadInput, match='--show-sharding with --check is not accepted'):
    plan.main(['plan', f'--config={CONFIG}', '--topology=v5p:2x2x4', '--show-sharding', '--check'])


def test_show_sharding_has_every_parameter_with_rule_and_bytes(capsys):
  out = run(capsys, '--topology=v5p:4x4x4', '--show-sharding')
  assert ', microbatches=' in out  # bytes a device are those of a layout, which is named
  found = tensors(Settings.from_config(mixtral_8x7b.get_config()))
  lines = {
    line.split()[0]: line
    for line in out.splitlines()
    if line.startswith(('stack', 'head', 'embed', 'norm'))
  }
  assert set(lines) == {tensor.path for tensor in found}
  for tensor in found:
    assert tensor.rule in lines[tensor.path]
  up = lines['stack/segments/0/blocks/0/moe/experts/w_up']
  assert 'expert, fsdp, tensor' in up


def test_a_layout_that_may_lose_rows_says_so():
  settings = Settings.from_config(mixtral_8x7b.get_config())
  work = workload(settings, 'tpu')
  layout = Layout({'data': 1, 'fsdp': 16, 'expert': 4, 'tensor': 1}, 'all_to_all', 4)
  (note,) = notes(work, layout)
  assert note.startswith('all_to_all has places for 2 times the mean load')
  assert notes(work, dataclasses.replace(layout, exchange='ragged_all_to_all')) == []
  (note,) = notes(work, dataclasses.replace(layout, exchange='ragged_fallback'))
  assert 'room for 1.5 times the mean load' in note
  places, copies = notes(work, dataclasses.replace(layout, exchange='sparse_fsdp'))
  assert places.startswith('sparse_fsdp has places for 1 times')
  assert copies.startswith('Rows of the 4 hottest experts')
  two = dataclasses.replace(layout, exchange='bilevel', options={'nodes': 2})
  places, messages = notes(work, two)
  assert places.startswith('bilevel has places for 2 and 2 times')
  assert messages.startswith('A device sends 1 messages between 2 nodes and 1 inside')


def test_options_of_another_exchange_are_to_be_removed():
  config = mixtral_8x7b.get_config()
  config.model.moe.exchange, config.model.moe.exchange_options = (
    'ragged_fallback',
    {'buffer_factor': 2},
  )
  work = workload(Settings.from_config(config), 'tpu')
  layout = Layout({'data': 1, 'fsdp': 16, 'expert': 4, 'tensor': 1}, 'all_gather', 4)
  (note,) = notes(work, layout)
  assert 'buffer_factor must go' in note


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), '--topology is missing: it must be one of v4:AxBxC'),
    (('--topology=v9:4x4',), '--topology=v9:4x4 is not accepted: it must be one of v4:AxBxC'),
    (('--topology=v5p:2x2x2', '--layout=worst'), '--layout=worst is not accepted'),
    (('--topology=v5p:2x2x2', '--top=-2'), 'flag --top=-2: -2 is not a positive integer'),
    (('--topology=v5e:2x2',), 'v5e:2x2 is too small by'),
    (('--topology=v5p:2x2x2', '--config.model.vocab_size=0'), '--config.model.vocab_size=N'),
  ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, message):
  with pytest.raises(BadInput, match=message.replace('(', r'\(')) as error:
    plan.main(['plan', '--config', CONFIG, *arguments])
  assert '\n' not in str(error.value)


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path):
  (tmp_path / 'file').write_text('')
  arguments = ['plan', '--config', TINY, '--topology=v5e:2x2']
  for page, why in (('file/plan.html', 'File exists'), ('.', 'Is a directory')):
    with pytest.raises(StorageError, match=why):
      plan.main([*arguments, f'--page={tmp_path / page}'])
  assert [one.name for one in tmp_path.iterdir()] == ['file']


def test_a_model_without_mixtures_is_planned_too(capsys, tmp_path):
  page = tmp_path / 'plan.html'
  flags = ['--topology=v5e:2x2', f'--page={page}', '--config.model.moe.layers=none']
  plan.main(['plan', '--config', TINY, *flags])
  assert '--config.mesh.expert=1' in capsys.readouterr().out
  assert 'experts' not in page.read_text().partition('<h2>Sharding')[2]
