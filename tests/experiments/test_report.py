"""The page of a run: what it shows of full, dense, image and broken runs."""

import html.parser
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import common
from experiments import plots
from experiments.errors import BadInput
from experiments.log import JsonLines
from experiments.report import main, render, write_report
from experiments.workdir import write_config


def _run(folder, steps=30, every=1, layers=4, experts=8, moe=True, change=None, **extra):
  """A run's folder as training leaves it."""
  config = common.get_config()
  config.steps, config.model.num_layers, config.model.moe.num_experts = steps, layers, experts
  config.model.moe.layers = 'all' if moe else 'none'
  if change:
    config.update_from_flattened_dict(change)
  folder.mkdir(parents=True, exist_ok=True)
  write_config(folder, config.to_dict())
  rng = np.random.default_rng(0)
  writer = JsonLines(folder / 'metrics.jsonl')
  for step in range(0, steps, every):
    load = rng.dirichlet(np.ones(experts), layers)
    metrics = {'loss': 5 / (step + 1), 'learning_rate': 1e-3, 'grad_norm': 1.0, **extra}
    if moe:
      metrics |= {
        'load': load.astype(np.float32),
        'max_load': load.max(1) * experts,
        'entropy': np.full(layers, 1.5),
        'dropped': np.full(layers, 0.25),
        'unrouted': np.zeros(layers),
        'balance_loss': 0.01,
        'z_loss': 0.002,
      }
    if step % 10 == 0:
      metrics['eval_loss'] = math.log(2) * 3
    writer.write(step, metrics, {'tokens_per_second': 12_000.0})
  writer.close()
  return folder


def _tiles(page):
  pairs = re.findall(r'<div><b>([^<]*)</b><span>([^<]*)</span>', page)
  return {name: value for value, name in pairs}


def _titles(page):
  return re.findall(r'<h3>([^<]*)</h3>', page)


def _check_well_formed(page):
  """Every tag is closed in order, and nothing is fetched from anywhere."""

  class Check(html.parser.HTMLParser):
    open_tags: list[str] = []  # noqa: RUF012

    def handle_starttag(self, tag, attributes):
      if tag not in ('meta',):
        self.open_tags.append(tag)

    def handle_endtag(self, tag):
      assert self.open_tags.pop() == tag

    def handle_startendtag(self, tag, attributes):
      pass

  check = Check()
  check.open_tags = []
  check.feed(page)
  assert check.open_tags == []
  assert not re.findall(r'https?://|src=|@import|url\((?!#)', page)
  assert not re.findall(r'\bnan\b|\binf\b|None', page)


def test_a_run_of_experts_shows_all_it_logged(tmp_path):
  page = write_report(
    _run(tmp_path / 'mine', parameters=18_400_000, active_parameters=6e6)
  ).read_text()
  _check_well_formed(page)
  assert '<h1>mine</h1>' in page
  assert 'decoder, 4 layers of width 128 · 8 experts in layers all by top_k (k=2)' in page
  assert _tiles(page) == {
    'of 30 steps': '30',
    'train loss': f'{np.mean([5 / 28, 5 / 29, 5 / 30]):.4f}',
    'eval loss': '2.0794',
    'bits per byte': '3.0000',
    'tokens/s': '12k',
    'parameters': '18.4M',
    'active a token': '6M',
    'dropped': '25.00%',
    'unrouted': '0.00%',
  }
  assert _titles(page) == [
    *('Loss', 'Learning rate', 'Gradient norm', 'Speed'),
    *('Layer 0', 'Layer 1', 'Layer 2', 'Layer 3'),
    *('Router entropy', 'Load of the busiest expert', 'Drops by cause', 'Auxiliary losses'),
  ]
  assert page.count('data:image/png') == 4


def test_a_pyramid_shows_no_experts_that_a_layer_does_not_have(tmp_path, monkeypatch):
  """Two, two and four experts, twice as many for granularity 2, and one that does nothing."""
  shown = []
  monkeypatch.setattr(plots, 'heat_map', lambda steps, shares: shown.append(shares.shape) or '')
  change = {'model.moe.pyramid': '2,2,4', 'model.moe.granularity': 2}
  change['model.moe.zero_experts'] = {'copy': 1}
  page = write_report(_run(tmp_path, layers=3, experts=9, change=change)).read_text()
  assert shown == [(30, 5), (30, 5), (30, 9)]
  assert 'of ln' not in page


def test_layers_are_named_as_in_the_model(tmp_path):
  change = {'model.num_layers': 8, 'model.moe.layers': 'every_2'}
  page = write_report(_run(tmp_path, change=change)).read_text()
  assert [title for title in _titles(page) if title.startswith('Layer')] == [
    *('Layer 1', 'Layer 3', 'Layer 5', 'Layer 7'),
  ]


def test_a_dense_run_has_no_routing(tmp_path):
  page = write_report(_run(tmp_path, moe=False)).read_text()
  _check_well_formed(page)
  assert _titles(page) == ['Loss', 'Learning rate', 'Gradient norm', 'Speed']
  assert 'Routing' not in page
  assert 'Load of the experts' not in page
  assert 'dropped' not in _tiles(page)


def test_images_have_accuracy_and_no_bytes(tmp_path):
  change = {'model.kind': 'vit', 'data.objective': 'classify'}
  page = write_report(_run(tmp_path, change=change, eval_accuracy=0.875)).read_text()
  tiles = _tiles(page)
  assert tiles['eval accuracy'] == '87.50%'
  assert tiles['images/s'] == '12k'
  assert 'bits per byte' not in tiles


def test_one_line_of_loss_alone_is_a_page():
  page = render('tiny', [{'step': 0, 'loss': 4.5}], {})
  _check_well_formed(page)
  assert _tiles(page) == {'steps': '1', 'train loss': '4.5000'}


def test_a_loss_that_was_not_finite_leaves_a_gap():
  lines = [{'step': 0, 'loss': 4.0}, {'step': 1, 'loss': None}, {'step': 2, 'loss': 2.0}]
  page = render('gap', lines, {})
  _check_well_formed(page)
  assert '"x":[0.0,2.0]' in page


def test_a_run_that_ends_without_finite_losses_says_so_and_shows_no_earlier_ones():
  lines = [{'step': step, 'loss': None if step >= 17 else 4.0} for step in range(20)]
  lines[10]['eval_loss'], lines[19]['eval_loss'] = 3.5, None
  config = common.get_config().to_dict()
  page = render('diverged', lines, config)
  _check_well_formed(page)
  tiles = _tiles(page)
  for name in ('train loss', 'eval loss', 'bits per byte'):
    assert tiles[name] == 'not finite'


def test_nulls_in_vectors_are_gaps(tmp_path):
  lines = [
    {'step': step, 'loss': 1.0, 'entropy': [1.0, None if step else 2.0]} for step in range(3)
  ]
  (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  page = write_report(tmp_path).read_text()
  _check_well_formed(page)
  assert 'Router entropy' in page


def test_the_config_is_a_table_and_its_texts_are_escaped(tmp_path):
  page = write_report(_run(tmp_path, change={'data.name': '<script>x'})).read_text()
  assert '&lt;script&gt;x' in page
  assert '<script>x' not in page
  assert '<td>learning_rate</td><td>0.001</td>' in page
  assert '<caption>model.moe.router</caption>' in page


def test_a_long_run_of_a_large_model_stays_a_small_file(tmp_path):
  folder = _run(tmp_path, steps=2000, every=2, layers=16, experts=64)
  assert write_report(folder).stat().st_size < 1.5e6


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(BadInput, match='has no run to report: metrics.jsonl is missing or empty'):
    write_report(tmp_path)
  with pytest.raises(BadInput, match=r'usage: python -m experiments\.report WORKDIR'):
    main(['report.py'])


def test_the_program_tells_where_the_page_is(tmp_path):
  _run(tmp_path)
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.report', str(tmp_path)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, f'{tmp_path}/report.html\n', '')
