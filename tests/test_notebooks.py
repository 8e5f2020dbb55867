"""Every notebook runs from its first cell to its figure, is free of outputs, and links to files that exist."""

import ast
import copy
import json
import os
import re
import subprocess
import sys

import matplotlib.image
import pytest

from tests.conftest import ROOT, with_test_flags

NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
SHORT = {'STEPS': 2, 'BATCH_SIZE': 2, 'DRAWS': 3}  # values of parameters while testing
RUN = 'import runpy, sys\nfor file in sys.argv[1:]: runpy.run_path(file)'

every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)


def load(path):
  return json.loads(path.read_text(encoding='utf-8'))


def source(cell) -> str:
  return ''.join(cell['source'])


def tags(cell) -> list[str]:
  return cell['metadata'].get('tags', [])


def program(notebook, values) -> str:
  """All code as one program; the cell tagged 'parameters' is followed by those of `values` that it sets."""
  parts = []
  for cell in notebook['cells']:
    if cell['cell_type'] == 'code':
      parts.append(source(cell))
      if 'parameters' in tags(cell):
        names = [node.targets[0].id for node in ast.parse(source(cell)).body]
        parts += [f'{name} = {values[name]!r}' for name in names if name in values]
  return '\n'.join(parts)


def faults(notebook) -> list[str]:
  """What keeps a notebook from being opened or reviewed."""
  cells, found = notebook['cells'], []
  code = [cell for cell in cells if cell['cell_type'] == 'code']
  if (notebook['nbformat'], notebook['nbformat_minor']) != (4, 5):
    found.append('the format is not 4.5')
  if len({cell['id'] for cell in cells}) < len(cells):
    found.append('ids repeat')
  if any(cell['outputs'] or cell['execution_count'] is not None for cell in code):
    found.append('outputs are not cleared')
  if sum('parameters' in tags(cell) for cell in cells) != 1:
    found.append('not exactly one cell is tagged parameters')
  return found


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Where all notebooks have run, in one process: NAME/figure.png."""
  folder = tmp_path_factory.mktemp('notebooks')
  files = []
  for path in NOTEBOOKS:
    values = {**SHORT, 'WORKDIR': str(folder / path.stem)}
    files.append(folder / f'{path.stem}.py')
    files[-1].write_text(program(load(path), values), encoding='utf-8')
  settings = {'MPLBACKEND': 'agg', 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': with_test_flags('', 1)}
  done = subprocess.run(
    [sys.executable, '-c', RUN, *map(str, files)],
    cwd=ROOT / 'notebooks',  # where Jupyter starts
    env={**os.environ, **settings},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return folder


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first has to wait for all: three short trainings
@every_notebook
def test_it_runs_to_its_figure(path, folder):
  pixels = matplotlib.image.imread(folder / path.stem / 'figure.png')
  assert min(pixels.shape[:2]) > 300
  drawn = (pixels[..., :3].min(-1) < 0.9).mean(0)  # part of each column that is not white
  assert (drawn > 0).mean() > 0.5


@every_notebook
def test_it_can_be_opened_and_reviewed(path):
  assert faults(load(path)) == []


@pytest.mark.parametrize(
  ('change', 'fault'),
  [
    ({'outputs': [{'text': '3'}]}, 'outputs are not cleared'),
    ({'execution_count': 1}, 'outputs are not cleared'),
    ({'id': 'cell-0'}, 'ids repeat'),
    ({'metadata': {'tags': ['parameters']}}, 'not exactly one cell is tagged parameters'),
  ],
)
def test_faults_are_found(change, fault):
  notebook = copy.deepcopy(load(NOTEBOOKS[0]))
  last = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code'][-1]
  last.update(change)
  assert faults(notebook) == [fault]


@every_notebook
def test_its_links_lead_to_files(path):
  links = [
    link
    for cell in load(path)['cells']
    for link in re.findall(r'\]\(([^)]+)\)', source(cell))
    if cell['cell_type'] == 'markdown'
  ]
  assert links
  assert not [link for link in links if not (path.parent / link).exists()]


def test_nothing_is_installed_outside_of_colab():
  """The first code cell asks for google.colab, and installs only below that question."""
  for path in NOTEBOOKS:
    first = next(cell for cell in load(path)['cells'] if cell['cell_type'] == 'code')
    inside = [node for node in ast.parse(source(first)).body if isinstance(node, ast.If)]
    assert ast.unparse(inside[0].test) == "'google.colab' in sys.modules"
    assert source(first).count('subprocess.run') == ast.unparse(inside[0]).count('subprocess.run')
