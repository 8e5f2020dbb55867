"""The command line: what it reads, and that every failure is one sentence, exit code 2, and nothing written."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from configs import common
from experiments import cli
from experiments.errors import BadInput, StorageError

_ROOT = Path(__file__).parents[2]
_COMMON = str(_ROOT / 'configs/common.py')


def _parse(*arguments, define=None):
  return cli.parse(['train.py', *arguments], 'experiments.train', define)


def _refused(*arguments, define=None):
  with pytest.raises(BadInput) as error:
    _parse(*arguments, define=define)
  assert '\n' not in str(error.value)
  return str(error.value)


def _config(folder, text):
  file = folder / 'mine.py'
  file.write_text(text)
  return str(file)


def test_overrides_reach_the_settings_and_the_resolved_config():
  settings, config, workdir, own = _parse(
    f'--config={_COMMON}',
    '--config.optim.learning_rate=0.5',
    '--config.steps',
    '7',
    '--config.profile=True',
    '--noconfig.log.tensorboard',
    '--workdir=somewhere',
  )
  assert (settings.optim.learning_rate, settings.steps, settings.profile) == (0.5, 7, True)
  assert not settings.log.tensorboard
  assert (config['optim']['learning_rate'], config['steps']) == (0.5, 7)
  assert (workdir, own) == (Path('somewhere'), {})


def test_the_last_of_two_overrides_counts():
  assert _parse(f'--config={_COMMON}', '--config.steps=7', '--config.steps=8')[0].steps == 8


def test_a_router_and_its_options_come_from_the_command_line():
  router = _parse(f'--config={_COMMON}', '--config.model.moe.router.capacity_factor=1.25')[
    0
  ].model.moe.router
  assert router == {'name': 'top_k', 'k': 2, 'capacity_factor': 1.25}
  router = _parse(f'--config={_COMMON}', "--config.model.moe.router={'name': 'soft', 'slots': 4}")[
    0
  ].model.moe.router
  assert router == {'name': 'soft', 'slots': 4}


@pytest.mark.parametrize(
  'overrides, router',
  [
    (['name=soft'], {'name': 'soft'}),
    (['name=switch'], {'name': 'switch'}),
    (['name=gshard', 'priority=token_major'], {'name': 'gshard', 'priority': 'token_major'}),
    (['name=top_k'], {'name': 'top_k', 'k': 2}),
    (['name=soft', 'k=2'], {'name': 'soft', 'k': 2}),  # said of soft, which will refuse it
    (['name=top_k', 'slots=4'], {'name': 'top_k', 'k': 2, 'slots': 4}),
    (['name=topk'], {'name': 'topk', 'k': 2}),
  ],
)
def test_a_router_chosen_by_name_has_no_options_of_the_one_before(overrides, router):
  arguments = [f'--config.model.moe.router.{one}' for one in overrides]
  settings, config, _, _ = _parse(f'--config={_COMMON}', *arguments)
  assert settings.model.moe.router == router
  assert config['model']['moe']['router'] == router


def test_options_that_both_routers_take_are_kept(tmp_path):
  file = _config(
    tmp_path,
    'from configs import common\n'
    'def get_config():\n'
    '  config = common.get_config()\n'
    "  config.model.moe.router = {'name': 'top_k', 'k': 3, 'noise_std': 0.5}\n"
    '  return config\n',
  )
  settings = _parse(f'--config={file}', '--config.model.moe.router.name=expert_choice')[0]
  assert settings.model.moe.router == {'name': 'expert_choice', 'noise_std': 0.5}


def test_without_workdir_a_fresh_one_is_named_after_the_config():
  workdir = _parse(f'--config={_COMMON}')[2]
  assert workdir.parent == Path('runs')
  assert workdir.name.startswith('common-2')


def test_the_part_after_a_colon_is_given_to_get_config(tmp_path):
  path = _config(
    tmp_path,
    'from configs import common\n'
    'def get_config(size):\n'
    '  config = common.get_config()\n'
    '  config.model.d_model = int(size)\n'
    '  return config\n',
  )
  settings, _, workdir, _ = _parse(f'--config={path}:64')
  assert settings.model.d_model == 64
  assert workdir.name.startswith('mine-64-')


def test_a_workdir_with_a_config_needs_no_other_and_its_config_is_only_read(tmp_path):
  config = common.get_config()
  config.steps = 77
  (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
  (tmp_path / 'config.py').write_text('raise SystemExit(3)')
  assert _parse(f'--workdir={tmp_path}')[0].steps == 77
  assert _parse(f'--workdir={tmp_path}', '--config.steps=78')[0].steps == 78
  assert _parse(f'--config={tmp_path}/config.json')[0].steps == 77


def test_a_program_has_flags_of_its_own():
  def define(values):
    flags.DEFINE_integer('samples', 3, 'texts to write', flag_values=values)

  assert _parse(f'--config={_COMMON}', '--samples=4', define=define)[3] == {'samples': 4}
  assert '--sample is not a setting: did you mean --samples?' == _refused(
    '--sample=4', define=define
  )
  assert 'samples=x' in _refused('--samples=x', define=define)


def test_help_lists_the_flags_and_ends_with_0(capsys):
  def define(values):
    flags.DEFINE_integer('samples', 3, 'texts to write', flag_values=values)

  with pytest.raises(SystemExit) as end:
    _parse('--help', define=define)
  assert end.value.code == 0
  text = capsys.readouterr().out
  assert text.startswith('usage: python -m experiments.train --config FILE.py[:arg]')
  assert '  --samples N             texts to write (default 3)\n' in text
  assert 'such as configs/tiny.py' in text


@pytest.mark.parametrize(
  ('program', 'takes', 'place'),
  [
    ('sweep', 'a file of runs, such as configs/sweeps/', 'without it runs/sweeps/<config>'),
    ('compare', 'a file of runs, such as configs/compare/', 'without it runs/compare/<config>'),
    ('evaluate', 'a config, such as', 'nothing is written'),
    ('plan', 'a config, such as', 'nothing is written there'),
  ],
)
def test_help_says_what_this_program_takes_and_where_it_writes(program, takes, place, capsys):
  main = importlib.import_module(f'experiments.{program}').main
  with pytest.raises(SystemExit):
    main([program, '--help'])
  text = capsys.readouterr().out
  assert takes in text and place in text
  assert (_ROOT / re.search(r'such as (configs/\S+\.py)', text)[1]).is_file()


@pytest.mark.parametrize(
  'arguments, sentence',
  [
    (
      [],
      '--config is missing: usage: python -m experiments.train --config FILE.py [--workdir DIR]',
    ),
    (['--config=no.py'], '--config=no.py is not accepted: there is no file no.py'),
    (
      ['--config=configs'],
      '--config=configs is not accepted: it must be a .py or .json file of this machine',
    ),
    (
      ['--config=gs://a/b.py'],
      '--config=gs://a/b.py is not accepted: it must be a .py or .json file of this machine',
    ),
    (
      ['--workdir=nowhere'],
      '--config is missing, and nowhere has no config.json: usage: python -m experiments.train --config FILE.py '
      '[--workdir DIR]',
    ),
    (['--config'], 'Missing value for flag --config'),
    (['--confg=a.py'], '--confg is not a setting: did you mean --config?'),
    (['--zzz=1'], '--zzz is not a setting: accepted are --config, --workdir, --config.key=value'),
  ],
)
def test_a_command_line_without_a_usable_config_is_refused(arguments, sentence):
  assert _refused(*arguments) == sentence


@pytest.mark.parametrize(
  'override, sentence',
  [
    ('--config.stesp=3', 'stesp is not a setting: did you mean steps?'),
    (
      '--config.optim.learning_rat=3',
      'optim.learning_rat is not a setting: did you mean optim.learning_rate?',
    ),
    (
      '--config.learning_rate=3',
      'learning_rate is not a setting: did you mean optim.learning_rate?',
    ),
    (
      '--config.mesh.rows=3',
      'mesh.rows is not a setting: accepted are mesh.data, mesh.expert, mesh.fsdp, mesh.tensor',
    ),
    (
      '--config.mesh.model=2',  # a section of another place is no answer
      'mesh.model is not a setting: accepted are mesh.data, mesh.expert, mesh.fsdp, mesh.tensor',
    ),
    (
      '--config.lr=3',
      'lr is not a setting: accepted are allow_leak, batch_size, checkpoint, compiler, data, eval, log, mesh, '
      'microbatches, model, optim, profile, seed, steps',
    ),
    ('--config.steps.x=3', 'steps.x is not a setting: did you mean steps?'),
    ('--config.steps=abc', "steps='abc' is not accepted: it must be an integer"),
    ('--config.steps=1.5', "steps='1.5' is not accepted: it must be an integer"),
    ('--config.steps=True', "steps='True' is not accepted: it must be an integer"),
    ('--config.steps=', "steps='' is not accepted: it must be an integer"),
    ('--config.optim.b1=None', "optim.b1='None' is not accepted: it must be a number"),
    ('--config.optim.b1=nan', 'optim.b1=nan is not accepted: it must be finite'),
    ('--config.profile=7', "profile='7' is not accepted: it must be True or False"),
    (
      '--config.model=3',
      "model='3' is not accepted: it must be a section, as in {'name': 'top_k'}",
    ),
    (
      '--config.model.moe={"num_experts": 4}',
      'model.moe.layers is missing: configs/common.py has the default of every key',
    ),
    (
      '--config.model.moe.router={"k": 4}',
      'model.moe.router.name=None is not accepted: it must be the name of a router',
    ),
    ('--config.steps', 'Missing value for flag --config.steps'),
    ('steps=3', "'steps=3' is not accepted: settings are given as --config.key=value"),
  ],
)
def test_an_override_that_cannot_be_used_is_refused(override, sentence):
  assert _refused(f'--config={_COMMON}', override) == sentence


@pytest.mark.parametrize(
  'text, sentence',
  [
    ('', 'is not a config: it has no function get_config'),
    (
      'def get_config():\n  return {}\n',
      'get_config() must return an ml_collections.ConfigDict, not a dict',
    ),
    (
      'def get_config():\n  pass\n',
      'get_config() must return an ml_collections.ConfigDict, not a NoneType',
    ),
    (
      'import nothing_of_this_name\n',
      "line 1: ModuleNotFoundError: No module named 'nothing_of_this_name'",
    ),
    ('def get_config():\n  x = 1\n  return x / 0\n', 'line 3: ZeroDivisionError: division by zero'),
    ('def get_config(:\n', 'line 1: SyntaxError: invalid syntax'),
    (
      'from configs import common\ndef get_config():\n  c = common.get_config()\n  c.steps = "many"\n  return c\n',
      'line 4: TypeError: ',
    ),
    (
      'from configs import common\ndef get_config():\n  c = common.get_config()\n  c.model.num_layer = 3\n  return c\n',
      'model.num_layer is not a setting: ',
    ),
  ],
)
def test_a_file_that_is_no_config_is_refused_with_the_place(tmp_path, text, sentence):
  path = _config(tmp_path, text)
  assert sentence in _refused(f'--config={path}')


def test_a_config_without_a_parameter_refuses_one():
  assert 'get_config() takes 0 positional arguments but 1 was given' in _refused(
    f'--config={_COMMON}:big'
  )


def test_json_that_is_no_config_is_refused(tmp_path):
  file = tmp_path / 'config.json'
  file.write_text('{"steps": ')
  assert f'{file} cannot be read as JSON' in _refused(f'--config={file}')
  file.write_text('[1]')
  assert _refused(f'--config={file}') == f'{file} holds a list, and a config must be an object'


@pytest.mark.parametrize('error, code', [(BadInput('no'), 2), (StorageError('disk'), 15)])
def test_run_turns_our_errors_into_a_sentence_and_their_exit_code(error, code, capsys):
  def main(argv):
    raise error

  with pytest.raises(SystemExit) as end:
    cli.run(main)
  assert end.value.code == code
  assert capsys.readouterr().err == f'{error}\n'


def test_run_ends_with_a_word_where_ctrl_c_is_not_handled(capsys):
  def main(argv):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as exit:
    cli.run(main)
  assert (exit.value.code, capsys.readouterr().err) == (130, 'Interrupted\n')


def test_run_keeps_the_traceback_of_other_errors():
  def main(argv):
    raise KeyError('a bug')

  with pytest.raises(KeyError):
    cli.run(main)


def _program(*arguments, cwd):
  code = (
    'import sys\n'
    'from experiments import cli\n'
    'def main(argv):\n'
    "  cli.parse(argv, 'experiments.train')\n"
    "  assert 'jax' not in sys.modules\n"
    'cli.run(main)\n'
  )
  environment = {**os.environ, 'PYTHONPATH': str(_ROOT), 'PYTHONDONTWRITEBYTECODE': '1'}
  return subprocess.run(
    [sys.executable, '-c', code, *arguments],
    cwd=cwd,
    env=environment,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_a_misspelt_key_ends_a_program_with_2_and_writes_nothing(tmp_path):
  done = _program(f'--config={_COMMON}', '--config.stesp=3', cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr == 'stesp is not a setting: did you mean steps?\n'
  assert list(tmp_path.iterdir()) == []


def test_a_good_command_line_is_read_without_starting_jax(tmp_path):
  done = _program(f'--config={_COMMON}', '--config.steps=3', cwd=tmp_path)
  assert (done.returncode, done.stderr) == (0, '')
  assert list(tmp_path.iterdir()) == []


_PROGRAMS = sorted(
  '.'.join(file.relative_to(_ROOT).with_suffix('').parts)
  for file in (_ROOT / 'experiments').rglob('*.py')
  if 'cli.run(main)' in file.read_text()
)


@pytest.mark.parametrize('name', _PROGRAMS)
def test_a_program_asked_for_help_or_given_what_it_does_not_know_does_nothing(
  name, tmp_path, monkeypatch, capsys
):
  """One of them measured for minutes, and replaced its results, whatever it was given."""
  program = importlib.import_module(name)
  monkeypatch.chdir(tmp_path)
  for given, code in (('--help', 0), ('--bogus', 2)):
    monkeypatch.setattr(sys, 'argv', [name, given])
    with pytest.raises(SystemExit) as exit:
      cli.run(program.main)
    assert exit.value.code == code
    assert f'python -m {name}' in (said := ''.join(capsys.readouterr())) or given in said
  assert not [*tmp_path.iterdir()]
