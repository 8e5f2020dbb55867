"""The README tells the truth: its code runs, its paths exist, its tables are those of the code."""

import ast
import math
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moejax
from experiments import build, cli
from experiments.errors import BadInput
from experiments.settings import ModelSettings, MoESettings
from moejax import Assignment, Context, Scores
from moejax.mesh.make import AXES
from moejax.moe.dispatch import DISPATCHES
from moejax.moe.exchange import EXCHANGES
from moejax.moe.kinds import KINDS
from moejax.moe.losses import LOSSES
from moejax.moe.momentum import MOMENTA
from moejax.moe.stats import routing_stats
from moejax.routers.capacity import PRIORITIES
from moejax.routers.expert_choice import GROUPS
from moejax.routers.top_k import SECOND_POLICIES
from moejax.routers.weighting import WEIGHTINGS, raw

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / 'README.md').read_text(encoding='utf-8')
PATH = re.compile(r'(?<![\w/.-])(?:[\w-]+/)+[\w-]+\.(?:py|md|svg|json|yml)\b')


def table(*columns) -> list[dict[str, str]]:
  """The rows, column -> cell, of the one table with this header."""
  head = f'| {" | ".join(columns)} |\n'
  assert README.count(head) == 1, head
  lines = README.partition(head)[2].partition('\n\n')[0].splitlines()[1:]
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
  return [dict(zip(columns, row, strict=True)) for row in cells]


def code(cell: str) -> list[str]:
  """What stands in backticks."""
  return re.findall('`([^`]*)`', cell)


@pytest.fixture(scope='module')
def names(tmp_path_factory) -> dict:
  """All names after the ```python blocks have run, in order, as one program."""
  blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len(blocks) == 5
  program = tmp_path_factory.mktemp('readme') / 'readme.py'
  program.write_text('\n'.join(blocks), encoding='utf-8')
  return runpy.run_path(str(program), run_name='readme')


def test_the_code_runs(names):
  assert jnp.isfinite(names['loss'])


def test_the_router_of_the_readme_is_what_it_says(names):
  """Trained by the task, safe against later tokens, blind to padding; p = 0.4 gives tokens unequal shares."""
  layer, x = names['layer'], names['x']
  graph, state = nnx.split(layer)
  gradient = jax.grad(lambda state: (nnx.merge(graph, state)(x)[0] ** 2).sum())(state)
  assert float(jnp.abs(gradient.router.scorer.kernel[...]).max()) > 1e-4
  y = layer(x)[0]
  changed = layer(x.at[0, 8:].set(0))[0]
  assert jnp.allclose(y[0, :8], changed[0, :8], atol=1e-5)
  assert not jnp.allclose(y[0, 8:], changed[0, 8:], atol=1e-2)
  mask = jnp.ones(x.shape[:2], bool).at[0, 8:].set(False)
  rows = names['top_p'](x, Context(mask=mask))
  assert (rows.expert.reshape(-1, 8)[8:16] == 8).all()
  count_t = (names['top_p'](x).expert.reshape(-1, 8) < 8).sum(1)
  assert count_t.min() >= 1
  assert count_t.max() > count_t.min()


def test_the_property_table_takes_the_router_of_the_readme(tmp_path):
  """In a process of its own, as a user runs it: a part of the table, in which the one false flag fails."""
  blocks = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len([line for line in blocks[3].splitlines() if line.strip()]) < 40
  (tmp_path / 'my_router.py').write_text(
    blocks[3] + '\n\ndef flagged_wrongly(**options):\n'
    '  made = my_router(**options)\n'
    '  made.flags = dataclasses.replace(made.flags, batch_free=False)\n'
    '  return made\n'
  )
  command = [sys.executable, '-m', 'pytest', '-n', '0', '-q', '-p', 'no:cacheprovider']
  command += ['-c', str(ROOT / 'setup.cfg'), '--rootdir', str(ROOT)]
  command += ['--router', 'my_router:flagged_wrongly', str(ROOT / 'tests')]
  command += ['-k', 'padding or contract or one_pass or other_sequences']
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run(
    command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 1, done.stdout[-2000:]
  assert '1 failed, 3 passed' in done.stdout
  assert 'test_other_sequences_change_outputs_only_where_the_flag_says_so' in done.stdout


def test_every_path_exists():
  links = [
    link for link in re.findall(r'\]\(([^)]+)\)', README) if link[0] != '#' and '://' not in link
  ]
  paths = {*links, *PATH.findall(README)}
  assert {'docs/layer.svg', 'scripts/bench_train.py', 'tests/experiments/test_train.py'} <= paths
  assert not [path for path in sorted(paths) if not (ROOT / path).exists()]


def test_every_section_that_is_linked_exists():
  links = set(re.findall(r'\]\(#([^)]+)\)', README))
  titles = re.findall(r'^##+ (.*)$', README, re.MULTILINE)
  assert 'not-there-yet' in links
  assert links <= {re.sub(r'[^\w -]', '', title).lower().replace(' ', '-') for title in titles}


def test_the_first_lines_count_what_there_is():
  said = re.search(r'\[(\d+) routers\].* (\d+) dispatches times (\d+) exchanges', README)
  there = (moejax.router_names(), DISPATCHES, EXCHANGES)
  assert said
  assert [int(number) for number in said.groups()] == [len(names) for names in there]
  results = (ROOT / 'experiments/results/README.md').read_text(encoding='utf-8')
  claims = re.search(r'(\d+) claims of papers: (\d+) reproduced, .* (\d+) opposite', results)
  said = re.search(r'\[(\d+) claims of papers\].* (\d+) were reproduced, (\d+) came', README)
  assert claims
  assert said
  assert said.groups() == claims.groups()


def test_the_figure_names_files_that_exist():
  figure = (ROOT / 'docs/layer.svg').read_text(encoding='utf-8')
  named = re.findall(r'class="file"[^>]*>(\w+)/([^<]*)<', figure)
  assert len(named) == 7
  for folder, files in named:
    for file in re.findall(r'\w+', files):
      path = ROOT / 'moejax' / folder / file
      assert path.with_suffix('.py').is_file() or path.is_dir(), f'{folder}/{file}'


def keywords(text: str) -> dict:
  """{'k': 2} of 'k=2'."""
  call = ast.parse(f'dict({text})', mode='eval').body
  assert isinstance(call, ast.Call)
  return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


def test_the_table_of_routers_is_the_flags():
  rows = table('router', 'with', 'prefix-safe', 'batch-free', 'paper', 'file')
  assert {code(row['router'])[0] for row in rows} == set(moejax.router_names())
  sizes = {'d_model': 8, 'num_experts': 4, 'rngs': nnx.Rngs(0)}
  for row in rows:
    options = keywords(''.join(code(row['with'])))
    flags = moejax.make_router(code(row['router'])[0], **sizes, **options).flags
    said = {'yes': True, 'no': False}
    assert said[row['prefix-safe']] == flags.prefix_safe, row
    assert said[row['batch-free']] == flags.batch_free, row


def test_the_tables_of_options_are_complete():
  values = [row['values'] for row in table('option', 'values', 'where')]
  exchanges = typing.get_args(typing.get_type_hints(MoESettings)['exchange'])
  attentions = typing.get_args(typing.get_type_hints(ModelSettings)['attention'])
  bodies = typing.get_args(typing.get_type_hints(MoESettings)['implementation'])
  accepted = [PRIORITIES, SECOND_POLICIES, GROUPS, KINDS, attentions]
  accepted += [DISPATCHES, bodies, exchanges, MOMENTA, AXES]
  assert [set(code(cell)) for cell in values] == [set(names) for names in accepted]
  rows = table('weighting', 'affinity', 'weights of the chosen', 'used by')
  assert {code(row['weighting'])[0]: row['affinity'] for row in rows} == {
    name: affinity for name, (affinity, _) in WEIGHTINGS.items()
  }
  plain = {code(r['weighting'])[0] for r in rows if r['weights of the chosen'] == 'as they are'}
  assert plain == {name for name, (_, weights) in WEIGHTINGS.items() if weights is raw}


def stats_of(probs_te, expert_tk):
  """Statistics of one sequence with these probabilities (and logits that lead to them) and choices."""
  num_tokens, k = expert_tk.shape
  scores = Scores(*(jnp.log(jnp.maximum(probs_te, 1e-30) * 8)[None],) * 3, probs_te[None])
  expert_r = expert_tk.reshape(-1).astype(jnp.int32)
  token_r = jnp.repeat(jnp.arange(num_tokens, dtype=jnp.int32), k)
  plan = Assignment(token_r, expert_r, jnp.ones(expert_r.size), expert_r, 8, num_tokens)
  return routing_stats(scores, plan, Context())


def test_the_table_of_losses_has_their_values():
  """Eight experts, two choices (one where a token is certain)."""
  tokens, experts, k = 16, 8, 2
  spread = jnp.arange(tokens * k).reshape(tokens, k) % experts
  one_hot = jax.nn.one_hot(jnp.arange(tokens) % experts, experts)
  first_two = jnp.broadcast_to(jnp.arange(k)[None], (tokens, k))
  stats = {
    'certain': stats_of(one_hot, one_hot.argmax(1)[:, None]),
    'undecided': stats_of(jnp.full((tokens, experts), 1 / experts), spread),
    'collapsed': stats_of(jax.nn.one_hot(first_two, experts).mean(1), first_two),
  }
  log = math.log(experts)
  values = {
    '0': 0,
    '1': 1,
    'E / k': experts / k,
    'E / k - 1': experts / k - 1,
    'log(k)': math.log(k),
    'sqrt(E)': math.sqrt(experts),
    'sqrt(k)': math.sqrt(k),
    '(E / k - 1) / (E - 1)': (experts / k - 1) / (experts - 1),
  }
  values |= {'log(E)': log, '-log(E)': -log, 'log(E)**2': log**2}
  rows = table('loss', 'certain', 'undecided', 'collapsed', 'source')
  assert {code(row['loss'])[0] for row in rows} == set(LOSSES)
  for row in rows:
    for case in stats:
      for said in code(row[case]):
        value = float(LOSSES[code(row['loss'])[0]](stats[case]))
        assert value == pytest.approx(values[said], abs=1e-5), (row['loss'], case)


def check(arguments: str):
  """What experiments.train checks before it touches a device."""
  argv = ['train', '--config', str(ROOT / 'configs/tiny.py'), *shlex.split(arguments)]
  build.check_routing(cli.parse(argv, 'experiments.train')[0])


@pytest.mark.parametrize('row', table('given', 'answer'), ids=lambda row: row['given'])
def test_bad_input_is_answered_as_printed(row):
  with pytest.raises(BadInput) as error:
    check(code(row['given'])[0])
  assert str(error.value) == code(row['answer'])[0]


def test_commands_name_programs_that_exist():
  modules = re.findall(r'scripts/python -m ([\w.]+)', README)
  programs = {name.removeprefix('experiments.') for name in modules if name != 'pytest'}
  assert {'train', 'sweep', 'fit', 'optimal', 'compare', 'claims'} <= programs
  assert all((ROOT / 'experiments' / f'{name}.py').is_file() for name in programs)
  assert all(
    (ROOT / path).is_file() for path in re.findall(r'scripts/python (scripts/\S+\.py)', README)
  )


def test_settings_that_are_named_exist():
  check('--config.steps=60')
  check("--config.model.moe.router=\"{'name': 'switch'}\"")
  for key in re.findall(r'`((?:model|data|optim|mesh)\.[\w.]+)`', README):
    with pytest.raises(BadInput, match=re.escape(f'did you mean {key}?')):
      check(f'--config.{key}x=1')
