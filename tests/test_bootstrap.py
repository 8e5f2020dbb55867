"""scripts/python with a stand-in for python3: what it starts, in which order, and what it says.

The stand-in writes its arguments to a log and answers as python3 would; nothing is installed.
"""

import fcntl
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Bits of python3 that the script needs; the real one serves `-c`, which takes the lock and compares.
STAND_IN = """#!/bin/sh
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in
  *version_info*) echo {version} ;;
  *base_prefix*) echo same ;;
  "-c "*) exec {python} "$@" ;;
  "-m venv "*)
    for venv; do :; done
    rm -rf "$venv"; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python"
    echo "command = python3 -m venv $venv" >"$venv/pyvenv.cfg" ;;
  "-m pip --version" | "-m ensurepip") exit {no_pip} ;;
  "-m uv "*) exit {uv} ;;
  "-m pip install -qq --editable "*) exit {pip} ;;
  "-m pip config list") echo "global.index-url='https://example.org/simple'" ;;
esac
"""


class Checkout:
  """A copy of what scripts/python reads, and the stand-in for python3 first on PATH."""

  def __init__(self, folder):
    self.folder = folder / 'a checkout'
    self.log = folder / 'log'
    self.bin = folder / 'bin'
    (self.folder / 'scripts').mkdir(parents=True)
    self.bin.mkdir()
    shutil.copy(ROOT / 'scripts' / 'python', self.folder / 'scripts' / 'python')
    for name in ('setup.cfg', 'pyproject.toml'):
      shutil.copy(ROOT / name, self.folder)
    self.stand_in()

  def stand_in(self, version='3.11.7', **exits):
    """`exits`: the exit statuses of uv and pip as installers, and of a question for pip at all."""
    exits = {'uv': 0, 'pip': 0, 'no_pip': 0} | exits
    text = STAND_IN.format(version=version, python=sys.executable, **exits)
    (self.bin / 'python3').write_text(text)
    (self.bin / 'python3').chmod(0o755)

  def command(self, *args, **variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('MOEJAX_', 'PYENV_', 'UV_'))}
    path = f'{self.bin}{os.pathsep}{os.environ["PATH"]}'
    env = {**kept, 'PATH': path, 'LOG': str(self.log), **variables}
    script = str(self.folder / 'scripts' / 'python')
    return {'args': [script, *args], 'env': env, 'cwd': self.folder.parent, 'text': True}

  def run(self, *args, **variables):
    """The finished process, and the lines that this call has logged."""
    self.log.write_text('')
    done = subprocess.run(
      **self.command(*args, **variables), capture_output=True, check=False, timeout=60
    )
    return done, self.log.read_text().splitlines()


@pytest.fixture
def checkout(tmp_path):
  return Checkout(tmp_path)


def made(log):
  return any('-m venv' in line for line in log)


def installed(log):
  return any('--editable' in line for line in log)


def test_it_is_plain_sh():
  assert subprocess.run(['sh', '-n', str(ROOT / 'scripts' / 'python')], check=False).returncode == 0
  assert os.access(ROOT / 'scripts' / 'python', os.X_OK)


def test_the_first_call_announces_itself_makes_installs_and_passes_the_arguments_on(checkout):
  done, log = checkout.run('-c', 'pass', 'an argument')
  assert done.returncode == 0, done.stderr
  assert done.stdout == ''
  assert done.stderr == 'Setting up .venv (once) ...\n'
  assert made(log)
  assert any(line.endswith('--editable .[data,test,dev]') for line in log)
  assert log[-1] == 'python -c pass an argument'


def test_the_second_call_starts_nothing_but_the_python_of_the_environment(checkout):
  checkout.run('-V')
  done, log = checkout.run('-V')
  assert log == ['python -V']
  assert done.stderr == ''


def test_the_exit_status_is_that_of_the_program(checkout):
  checkout.run('-V')
  done, _ = checkout.run('-c', 'raise SystemExit(7)')
  assert done.returncode == 7


def test_a_changed_setup_cfg_is_installed_into_the_same_environment(checkout):
  checkout.run('-V')
  with (checkout.folder / 'setup.cfg').open('a') as f:
    f.write('# one more line\n')
  done, log = checkout.run('-V')
  assert done.returncode == 0
  assert installed(log)
  assert not made(log)


def test_extras_are_chosen_by_a_variable(checkout):
  _, log = checkout.run('-V', MOEJAX_EXTRAS='tpu,data')
  assert any(line.endswith('--editable .[tpu,data]') for line in log)
  _, log = checkout.run('-V', MOEJAX_EXTRAS='')
  assert any(line.endswith('--editable .') for line in log)


def test_another_choice_of_pyenv_is_looked_at(checkout):
  checkout.run('-V')
  _, log = checkout.run('-V', PYENV_VERSION='3.12.1')
  assert installed(log)


def test_a_moved_checkout_is_set_up_anew(checkout):
  checkout.run('-V')
  checkout.folder = checkout.folder.rename(checkout.folder.parent / 'moved')
  _, log = checkout.run('-V')
  assert made(log)


def test_a_failed_install_is_reported_and_redone_from_the_start(checkout):
  checkout.stand_in(uv=1, pip=1)
  done, _ = checkout.run('-V')
  assert done.returncode == 1
  assert done.stderr.endswith('scripts/python: pip could not install .[data,test,dev]\n')
  checkout.stand_in()
  done, log = checkout.run('-V')
  assert done.returncode == 0
  assert made(log)


def test_pip_installs_where_uv_fails(checkout):
  checkout.stand_in(uv=1)
  done, log = checkout.run('-V')
  assert done.returncode == 0
  assert 'python -m pip install -qq --editable .[data,test,dev]' in log
  assert 'installing with pip' in done.stderr


def test_a_python_without_pip_and_ensurepip_is_refused_with_advice(checkout):
  checkout.stand_in(no_pip=1)
  done, log = checkout.run('-V')
  assert done.returncode == 2
  assert 'neither pip nor ensurepip' in done.stderr
  assert not installed(log)


def test_uv_is_told_the_index_of_pip(checkout):
  log = checkout.folder.parent / 'uv'
  script = checkout.bin / 'python3'
  script.write_text(script.read_text().replace('exit 0 ;;', f'env >>"{log}" ;;', 2))
  done, _ = checkout.run('-V')
  assert done.returncode == 0, done.stderr
  assert 'UV_DEFAULT_INDEX=https://example.org/simple' in log.read_text().splitlines()


@pytest.mark.parametrize('version', ['2.7.18', '3.6.15', '3.9.18', '3.10.13'])
def test_an_old_python_is_refused_in_one_sentence(checkout, version):
  checkout.stand_in(version=version)
  done, log = checkout.run('-V')
  assert done.returncode == 2
  assert done.stderr == f'scripts/python: needs Python 3.11 or newer; python3 is {version}\n'
  assert not made(log)


def test_the_second_of_two_first_calls_waits_for_the_first(checkout):
  with (checkout.folder / '.venv.lock').open('a') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    checkout.log.write_text('')
    with subprocess.Popen(
      **checkout.command('-V'), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as call:
      assert call.stderr.readline().startswith('Waiting for another scripts/python')
      assert not made(checkout.log.read_text().splitlines())
      fcntl.flock(lock, fcntl.LOCK_UN)
      assert call.wait(timeout=60) == 0
  assert made(checkout.log.read_text().splitlines())
