"""The command line that every program shares.

  python -m experiments.train --config configs/x.py[:arg] [--config.key=value ...] [--workdir DIR]

A .py config is executed, so it must be a file of this machine. A .json config, such as the config.json that every
run leaves in its workdir, is only read; with --workdir alone that config.json is the config.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import re
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from experiments import workdir as workdirs
from experiments.errors import BadInput, ExperimentError
from experiments.later import with_later
from experiments.schema import unknown_key
from experiments.settings import Settings

_ROUTER = 'model.moe.router'
# their keys are a router's, losses, kinds of experts
_OPEN_SECTIONS = (
  _ROUTER,
  'model.moe.losses',
  'model.moe.zero_experts',
  'model.moe.exchange_options',
  'optim.decay_of',
)
_TYPE_NAMES = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'a str'}

_USAGE = """usage: python -m {program} --config FILE.py[:arg] [--config.key=value ...] [--workdir DIR]

  --config FILE.py[:arg]  {config}
  --config.key=value      overrides one setting, such as --config.optim.learning_rate=1e-3
  --workdir DIR           {workdir}
"""
_CONFIG = 'a config, such as configs/tiny.py; without it the config.json in the workdir'
_FOLDER = 'where the run writes, and resumes from; without it runs/<config>-<date-time>'
_VALUES = {'int': ' N', 'bool': ''}


def parse(
  argv: list[str],
  program: str,
  define: Callable[[flags.FlagValues], None] | None = None,
  workdir: str = _FOLDER,
) -> tuple[Settings, dict[str, Any], Path, dict[str, Any]]:
  """Settings, the resolved config as a plain dict, the workdir (not yet made), and the program's own flags.

  Args:
    argv: as sys.argv: the first is the program's file.
    program: its module name, for the usage text, such as 'experiments.train'.
    define: adds the program's own flags to a FlagValues.
    workdir: what the program does with --workdir, for the usage text.

  Raises:
    BadInput: one sentence; nothing was written and no device was touched.
    SystemExit: with 0, after --help.
  """
  path, given, own, rest = parse_own(argv, program, define, workdir=workdir)
  config = override(_load(path), ['', *rest])
  settings = Settings.from_config(config)
  file, _, argument = path.partition(':')
  name = '-'.join(filter(None, (Path(file).stem, argument)))
  folder = Path(given) if given else workdirs.fresh(name)
  return settings, config.to_dict(), folder, own


def folders(argv: list[str], program: str, names: tuple[str, ...] = ('DIR',)) -> list[Path]:
  """The folders that are a program's only arguments; `names` may be empty.

  Raises:
    BadInput: there are more or fewer, or one does not exist.
    SystemExit: with 0, after --help.
  """
  usage = ' '.join([f'usage: python -m {program}', *names])
  if argv[1:] == ['--help']:
    print(usage)
    sys.exit(0)
  if len(argv) != len(names) + 1:
    raise BadInput(f'{" ".join(argv[1:])!r} is not accepted: {usage}')
  for name, given in zip(names, argv[1:], strict=True):
    if not Path(given).is_dir():
      raise BadInput(f'{name}={given} is not accepted: there is no such folder')
  return [Path(given) for given in argv[1:]]


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
  """Runs a program; the errors of experiments.errors become one sentence and their exit code, Ctrl-C a word and 130."""
  try:
    code = main(sys.argv)
  except ExperimentError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
  except KeyboardInterrupt:
    print('Interrupted', file=sys.stderr)
    code = 130  # as shells have it: 128 and the number of the signal
  sys.exit(code or 0)


def parse_own(
  argv: list[str],
  program: str,
  define: Callable[[flags.FlagValues], None] | None = None,
  config: str = _CONFIG,
  workdir: str = _FOLDER,
) -> tuple[str, str, dict[str, Any], list[str]]:
  """--config, --workdir (empty if not given), the program's own flags, and the rest of `argv`: the overrides.

  With --workdir alone the config is the config.json in there. Arguments and errors as of `parse`; `config` says what
  the program takes as --config.
  """
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  for name in ('config', 'workdir'):
    flags.DEFINE_string(name, '', '', flag_values=values)
  flags.DEFINE_boolean('help', False, '', flag_values=values)
  if define:
    define(values)
  rest = _parse_flags(values, argv, known_only=True)
  if values.help:
    own = [name for name in values if name not in ('config', 'workdir', 'help')]
    lines = [_flag_line(values[name]) for name in own]
    print(_USAGE.format(program=program, config=config, workdir=workdir) + ''.join(lines), end='')
    sys.exit(0)
  named = {name: value for name, value in values.flag_values_dict().items() if name != 'help'}
  for argument in rest[1:]:
    key = argument.lstrip('-').partition('=')[0]
    if argument.startswith('-') and not _override_key(argument):
      raise BadInput(
        unknown_key(f'--{key}', [f'--{name}' for name in [*named, 'config.key=value']])
      )
  path, given = named.pop('config'), named.pop('workdir')
  if not path and given and workdirs.config_path(Path(given)).is_file():
    path = str(workdirs.config_path(Path(given)))
  if not path:
    alone = f', and {given} has no config.json' if given else ''
    raise BadInput(
      f'--config is missing{alone}: usage: python -m {program} --config FILE.py [--workdir DIR]'
    )
  return path, given, named, rest[1:]


def _flag_line(flag: flags.Flag) -> str:
  """'  --workers N             runs at a time (default 1)'."""
  name = flag.name + _VALUES.get(flag.flag_type(), ' VALUE')
  default = '' if flag.default in (None, '', False) else f' (default {flag.default_as_str})'
  return f'  --{name:<21} {flag.help}{default.replace(chr(39), "")}\n'


def _parse_flags(values: flags.FlagValues, argv: list[str], known_only: bool = False) -> list[str]:
  try:
    return values(argv, known_only=known_only)
  except flags.Error as error:
    raise BadInput(_one_line(error)) from error


def _load(path: str) -> ConfigDict:
  """The config of FILE.py[:arg], executed, or of FILE.json, read."""
  name, colon, argument = path.partition(':')
  file = Path(name)
  if file.suffix not in ('.py', '.json'):
    raise BadInput(
      f'--config={path} is not accepted: it must be a .py or .json file of this machine'
    )
  if not file.is_file():
    raise BadInput(f'--config={path} is not accepted: there is no file {file}')
  if file.suffix == '.json':
    return ConfigDict(with_later(workdirs.read_json(file)))
  (config,) = execute(file, 'a config', ('get_config',), (argument,) if colon else ())
  if not isinstance(config, ConfigDict):
    kind = type(config).__name__
    raise BadInput(f'{file}: get_config() must return an ml_collections.ConfigDict, not a {kind}')
  return config


class _Fresh(importlib.machinery.SourceFileLoader):
  """Reads the source every time: compiled files are told apart by whole seconds and sizes, and configs are small."""

  def get_code(self, fullname: str) -> types.CodeType:
    return self.source_to_code(self.get_data(self.path), self.path)


def execute(
  file: Path, kind: str, functions: tuple[str, ...], arguments: tuple[str, ...] = ()
) -> list[Any]:
  """Executes a .py file and returns what its functions return.

  Args:
    file: of this machine.
    kind: what the file should be, for the message: 'a config'.
    functions: names of the functions.
    arguments: of each.

  Raises:
    BadInput: there is no such file or function, or the file raises; one sentence that says where.
  """
  if file.suffix != '.py' or not file.is_file():
    raise BadInput(f'--config={file} is not accepted: it must be a .py file of this machine')
  loader = _Fresh('config_file', str(file))
  spec = importlib.util.spec_from_loader('config_file', loader)
  assert spec is not None  # a loader of a file has one
  module = importlib.util.module_from_spec(spec)
  try:
    loader.exec_module(module)
    for name in functions:
      if not hasattr(module, name):
        raise BadInput(f'--config={file} is not {kind}: it has no function {name}')
    return [getattr(module, name)(*arguments) for name in functions]
  except BadInput:
    raise
  except Exception as error:  # whatever a user's file raises becomes a sentence that says where
    frames = traceback.extract_tb(error.__traceback__)
    lines = [str(frame.lineno) for frame in frames if frame.filename == str(file)]
    if isinstance(error, SyntaxError) and error.filename == str(file):
      lines.append(str(error.lineno))
    where = f'{file}, line {lines[-1]}' if lines else f'{file}'
    raise BadInput(f'{where}: {type(error).__name__}: {_one_line(error)}') from error


def override(config: ConfigDict, argv: list[str]) -> ConfigDict:
  """`config` with the values of the `--config.key=value` arguments in argv[1:].

  A router that is chosen by `model.moe.router.name` alone does not get those options of the config's own router that it
  does not take. Options that `argv` itself gives stay, so that a wrong one is an error.

  Raises:
    BadInput: an unknown key, a value of another type, or an argument that is none of these.
  """
  accepted = keys(config)
  for argument in argv[1:]:
    key = _override_key(argument)
    if key and key not in accepted and key.rpartition('.')[0] not in _OPEN_SECTIONS:
      section = key.rpartition('.')[0]
      beside = [name for name in accepted if name.rpartition('.')[0] == section]
      raise BadInput(unknown_key(key, accepted, beside or list(config)))
  router_before = _router(config)
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  try:
    config_flags.DEFINE_config_dict(
      'config',
      config,
      flag_values=values,
      lock_config=False,
      accept_new_attributes=True,
      sys_argv=argv,
    )
    left = values(argv)
  except flags.IllegalFlagValueError as error:
    raise BadInput(_type_sentence(config, argv, error)) from error
  except flags.Error as error:
    raise BadInput(_one_line(error)) from error
  if left[1:]:
    raise BadInput(f'{left[1]!r} is not accepted: settings are given as --config.key=value')
  _drop_left_over(values.config, router_before, {_override_key(argument) for argument in argv[1:]})
  return values.config


def _router(config: ConfigDict) -> dict[str, Any]:
  """What the config says of its router; empty where it says nothing."""
  section: Any = config
  for name in _ROUTER.split('.'):
    section = section.get(name) if isinstance(section, ConfigDict) else None
  return section.to_dict() if isinstance(section, ConfigDict) else {}


def _drop_left_over(config: ConfigDict, before: dict[str, Any], given: set[str]) -> None:
  """Removes options of the router `before` that a router chosen by name does not take.

  Args:
    config: with all overrides.
    before: the router of the config's file.
    given: keys that were overridden.
  """
  router = _router(config)
  name = router.get('name')
  if f'{_ROUTER}.name' not in given or _ROUTER in given or name == before.get('name'):
    return
  from moejax.routers import router_names, router_options  # jax, which nothing else here needs

  if name not in router_names():
    return  # refused, with the names that are accepted, where the router is made
  for key in set(before) - {'name', *router_options(name)}:
    if f'{_ROUTER}.{key}' not in given:
      del config.model.moe.router[key]


def _override_key(argument: str) -> str:
  """'optim.b1' of '--config.optim.b1=0.9'; empty for other arguments."""
  match = re.match(r'--?(?:no)?config\.([^=]*)', argument)
  return match[1] if match else ''


def keys(config: ConfigDict, prefix: str = '') -> list[str]:
  """All dotted keys, those of sections included."""
  found = []
  for name, value in config.items():
    found.append(f'{prefix}{name}')
    if isinstance(value, ConfigDict):
      found += keys(value, f'{prefix}{name}.')
  return found


def _type_sentence(config: ConfigDict, argv: list[str], error: flags.IllegalFlagValueError) -> str:
  """'steps='x' is not accepted: it must be an integer', from absl's 'flag --config.steps=x: ...'."""
  match = re.match(r'flag --config\.([^=]+)=(.*?): ', str(error), re.DOTALL)
  if not match:
    return _one_line(error)
  value = config
  for name in match[1].split('.'):
    value = value[name]
  accepted = _TYPE_NAMES.get(type(value), "a section, as in {'name': 'top_k'}")
  return f'{match[1]}={match[2]!r} is not accepted: it must be {accepted}'


def _one_line(error: BaseException) -> str:
  return ' '.join(str(error).split())
