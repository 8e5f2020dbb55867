"""One page that shows a run: `python -m experiments.report WORKDIR` writes WORKDIR/report.html.

It reads metrics.jsonl and config.json, and nothing else. Of metrics it knows `loss`, `accuracy`, `eval_loss`,
`eval_accuracy`, `learning_rate`, `grad_norm`, `balance_loss`, `z_loss`; of each MoE layer `entropy`, `max_load`,
`dropped` and `unrouted` [L] and `load` [L, E]; `parameters` and `active_parameters` (on any line); under `time`,
`tokens_per_second` and `mfu`. What a run did not log is left out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, plots
from experiments.errors import BadInput
from experiments.log import read_lines
from experiments.plots import Line, depth_colour, line_chart, number
from experiments.report_page import SCRIPT, STYLE
from experiments.settings import moe_layers
from experiments.workdir import config_path, read_json, write_text

_BLUE, _ORANGE, _VIOLET, _GREEN = '#3a7bd5', '#e8702a', '#8a63d2', '#2f9e6e'


def write_report(workdir: Path) -> Path:
  """Writes report.html of the run in `workdir`, and returns its path.

  Raises:
    BadInput: there is no run.
    StorageError: the page cannot be written.
  """
  lines = read_lines(workdir / 'metrics.jsonl', convert=_smaller)
  if not lines:
    raise BadInput(f'{workdir} has no run to report: metrics.jsonl is missing or empty')
  file = config_path(workdir)
  page = workdir / 'report.html'
  write_text(page, render(workdir.absolute().name, lines, read_json(file) if file.exists() else {}))
  return page


def render(name: str, lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
  """The page of a run: its metrics by line, and its config."""
  run = _Run(lines, config)
  body = ''.join((_curves(run), _loads(run), _routing(run), _config_tables(config)))
  script = SCRIPT.replace('WIDTH', '560').replace('LEFT', '52').replace('RIGHT', '12')
  title = html.escape(name)
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f'<title>{title}</title><style>{STYLE}</style></head><body>'
    f'<header><h1>{title}</h1><p>{html.escape(_summary(config))}</p>{_tiles(run)}</header>'
    f'<main>{body}</main><script>{script}</script></body></html>\n'
  )


class _Run:
  """Metrics by name."""

  def __init__(self, lines: Sequence[Mapping[str, Any]], config: Mapping[str, Any]):
    self.lines, self.config = lines, config

  def get(self, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps `[N]` and values `[N, ...]` of the lines that have `key`; 'time.x' looks under time."""
    first, _, rest = key.partition('.')
    pairs = [(line['step'], line.get(first)) for line in self.lines]
    if rest:
      pairs = [(step, value.get(rest) if value else None) for step, value in pairs]
    pairs = [(step, value) for step, value in pairs if value is not None]
    shapes = {np.shape(value) for _, value in pairs}
    if len(shapes) != 1:
      return np.zeros(0), np.zeros(0)
    steps, values = zip(*pairs, strict=True)
    return np.array(steps, np.float64), np.array(values, np.float64)

  def last(self, key: str) -> float | None:
    """The last number of `key`, NaN where it was not finite; None where it was not logged."""
    found = [line[key] for line in self.lines if key in line]
    return (math.nan if found[-1] is None else float(found[-1])) if found else None

  def layers(self) -> list[int]:
    """Indices in the model of the MoE layers."""
    counts = [
      values.shape[1] for key in ('load', 'entropy') if (values := self.get(key)[1]).ndim > 1
    ]
    model = self.config.get('model', {})
    named = moe_layers(model.get('moe', {}).get('layers', 'none'), model.get('num_layers', 0))
    return list(named) if counts and len(named) == counts[0] else list(range(max([0, *counts])))

  def experts(self) -> list[int]:
    """How many experts each MoE layer's router knows."""
    _, loads = self.get('load')
    if loads.ndim != 3:
      return []
    return experts_of_layers(self.config, *loads.shape[1:])


def experts_of_layers(config: Mapping[str, Any], layers: int, widest: int) -> list[int]:
  """How many experts the router of each MoE layer knows, whose loads are logged as `[layers, widest]`.

  Of a pyramid, the loads of narrower layers end in zeros that are nobody's.
  """
  moe = config.get('model', {}).get('moe', {})
  extra = sum(moe.get('zero_experts', {}).values())
  counts = [
    int(count) * moe['granularity'] + extra
    for count in filter(None, moe.get('pyramid', '').split(','))
  ]
  return counts if len(counts) == layers else [widest] * layers


def _summary(config: Mapping[str, Any]) -> str:
  """'decoder, 4 layers of width 128 · 8 experts in layers all by top_k (k=2) · wiki6 · ...'."""
  model = config.get('model')
  if not model:
    return ''
  moe = model['moe']
  parts = [f'{model["kind"]}, {model["num_layers"]} layers of width {model["d_model"]}']
  if moe['layers'] != 'none':
    router = dict(moe['router'])
    name = router.pop('name')
    options = ', '.join(f'{key}={value}' for key, value in router.items())
    experts = moe['num_experts'] * moe['granularity']
    parts.append(
      f'{experts} experts in layers {moe["layers"]} by {name}' + f' ({options})' * bool(options)
    )
  data, steps = config['data'], config['steps']
  parts += [data['name'], f'{steps:,} steps of {config["batch_size"]}', f'seed {config["seed"]}']
  return ' · '.join(parts)


def _tiles(run: _Run) -> str:
  """The run's key numbers."""
  _, speeds = run.get('time.tokens_per_second')
  _, mfu = run.get('time.mfu')
  loss, accuracy = run.last('eval_loss'), run.last('eval_accuracy')
  data = run.config.get('data', {})
  bytewise = data.get('tokenizer') == 'bytes' and data.get('objective') == 'causal'
  parameters, active = run.last('parameters'), run.last('active_parameters')
  tiles = [
    (
      f'of {run.config["steps"]:,} steps' if run.config else 'steps',
      f'{run.lines[-1]["step"] + 1:,}',
    ),
    ('train loss', _tail_mean(run, 'loss', '{:.4f}')),
    ('eval loss', _finite(loss, '{:.4f}')),
    (
      'bits per byte',
      _finite(loss / math.log(2), '{:.4f}') if loss is not None and bytewise else None,
    ),
    ('eval accuracy', _finite(accuracy, '{:.2%}')),
    (
      _speed_unit(run),
      _short(float(np.median(speeds))) if speeds.size else None,
    ),
    ('MFU', f'{np.median(mfu):.1%}' if mfu.size else None),
    ('parameters', _short(parameters) if parameters else None),
    ('active a token', _short(active) if active else None),
    ('dropped', _tail_mean(run, 'dropped', '{:.2%}')),
    ('unrouted', _tail_mean(run, 'unrouted', '{:.2%}')),
  ]
  cells = ''.join(f'<div><b>{value}</b><span>{name}</span></div>' for name, value in tiles if value)
  return f'<div class="numbers">{cells}</div>'


def _speed_unit(run: _Run) -> str:
  return 'images/s' if run.config.get('data', {}).get('objective') == 'classify' else 'tokens/s'


def _curves(run: _Run) -> str:
  steps, loss = run.get('loss')
  eval_steps, eval_loss = run.get('eval_loss')
  cards = [
    _card(
      'Loss',
      [Line('train', steps, loss, _BLUE), Line('eval', eval_steps, eval_loss, _ORANGE, dots=True)],
      'nats',
    ),
    _card(
      'Accuracy',
      [
        Line('train', *run.get('accuracy'), _BLUE),
        Line('eval', *run.get('eval_accuracy'), _ORANGE, dots=True),
      ],
    ),
    _card(
      'Learning rate', [Line('learning rate', *run.get('learning_rate'), _GREEN)], from_zero=True
    ),
    _card(
      'Gradient norm', [Line('before clipping', *run.get('grad_norm'), _VIOLET)], from_zero=True
    ),
    _card(
      'Speed', [Line(_speed_unit(run), *run.get('time.tokens_per_second'), _GREEN)], from_zero=True
    ),
  ]
  return _section('Training', cards)


def _loads(run: _Run) -> str:
  """One heat map a layer."""
  steps, loads = run.get('load')
  if loads.ndim != 3:
    return ''
  cards = [
    f'<div class="card"><h3>Layer {layer}</h3>{plots.heat_map(steps, loads[:, index, :count])}</div>'
    for index, (layer, count) in enumerate(zip(run.layers(), run.experts(), strict=True))
  ]
  return (
    '<div class="head"><div><h2>Load of the experts</h2>'
    '<p>Share of the assignments, experts from top to bottom, steps from left to right</p></div>'
    f'{plots.heat_scale()}</div><div class="grid{" many" * (len(cards) > 6)}">{"".join(cards)}</div>'
  )


def _routing(run: _Run) -> str:
  layers, counts = run.layers(), set(run.experts())
  cards = [
    _card(
      'Router entropy',
      _by_layer(run, 'entropy', layers),
      f'nats, of ln {counts.pop()}' if len(counts) == 1 else 'nats',
    ),
    _card('Load of the busiest expert', _by_layer(run, 'max_load', layers), '× mean'),
    _card(
      'Drops by cause',
      [
        _over_layers(run, 'dropped', 'over capacity', _ORANGE),
        _over_layers(run, 'unrouted', 'no expert', _VIOLET),
      ],
      'mean, range of layers',
      from_zero=True,
    ),
    _card(
      'Auxiliary losses',
      [
        Line('balance', *run.get('balance_loss'), _BLUE),
        Line('z', *run.get('z_loss'), _GREEN),
      ],
      from_zero=True,
    ),
  ]
  return _section('Routing', cards)


def _by_layer(run: _Run, key: str, layers: Sequence[int]) -> list[Line]:
  steps, values = run.get(key)
  if values.ndim != 2:
    return []
  count = values.shape[1]
  return [
    Line(
      f'layer {layer}' if not index else str(layer),
      steps,
      values[:, index],
      depth_colour(index, count),
    )
    for index, layer in enumerate(layers)
  ]


def _over_layers(run: _Run, key: str, name: str, colour: str) -> Line:
  steps, values = run.get(key)
  if values.ndim == 1:
    return Line(name, steps, values, colour)
  return Line(name, steps, values.mean(1), colour, values.min(1), values.max(1))


def _card(title: str, lines: Sequence[Line], unit: str = '', from_zero: bool = False) -> str:
  """A chart with its title; nothing where nothing was logged."""
  lines = [line for line in lines if np.isfinite(line.y).any()]
  if not lines:
    return ''
  return (
    f'<div class="card"><h3>{title}</h3>{line_chart(lines, unit=unit, from_zero=from_zero)}</div>'
  )


def _section(title: str, cards: Sequence[str]) -> str:
  return f'<h2>{title}</h2><div class="grid">{"".join(cards)}</div>' if any(cards) else ''


def _config_tables(config: Mapping[str, Any]) -> str:
  """A table for each section of the config."""
  if not config:
    return ''
  tables: dict[str, list[tuple[str, Any]]] = {}

  def walk(section: Mapping[str, Any], name: str) -> None:
    for key, value in section.items():
      if isinstance(value, dict):
        walk(value, f'{name}.{key}' if name else key)
      else:
        tables.setdefault(name, []).append((key, value))

  walk(config, '')
  texts = [
    f'<table><caption>{html.escape(name or "run")}</caption>'
    + ''.join(
      f'<tr><td>{html.escape(key)}</td><td>{html.escape(_value(value))}</td></tr>'
      for key, value in rows
    )
    + '</table>'
    for name, rows in sorted(tables.items())
  ]
  return f'<h2>Config</h2><div class="config">{"".join(texts)}</div>'


def _value(value: Any) -> str:
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  return str(value) if value != '' else '–'


def _tail_mean(run: _Run, key: str, form: str) -> str | None:
  """The mean of what was finite in the last tenth of the run."""
  values = [line[key] for line in run.lines if key in line]
  if not values:
    return None
  tail = [one for one in values[-max(1, len(values) // 10) :] if one is not None]
  tail = [np.asarray(one)[np.isfinite(one)] for one in tail]
  tail = [one.mean() for one in tail if one.size]
  return _finite(float(np.mean(tail)) if tail else math.nan, form)


def _finite(value: float | None, form: str) -> str | None:
  """The number as text; 'not finite' where it is that, so that no earlier one is taken for it."""
  if value is None:
    return None
  return form.format(value) if math.isfinite(value) else 'not finite'


def _short(value: float) -> str:
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if value >= size:
      return f'{value / size:.3g}{letter}'
  return number(value)


def _smaller(value: Any) -> Any:
  """Lists as arrays; null is NaN."""
  return np.array(value, np.float32) if isinstance(value, list) else value


def main(argv: list[str]) -> int:
  """`python -m experiments.report WORKDIR`."""
  (folder,) = cli.folders(argv, 'experiments.report', ('WORKDIR',))
  print(write_report(folder))
  return 0


if __name__ == '__main__':
  cli.run(main)
