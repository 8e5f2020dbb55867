"""Plots of a fitted law as PNG: loss against FLOPs, iso-FLOP curves, the optimum by FLOPs, predicted against measured.

FLOPs of iso-FLOP curves and of the optimum are those of the models of Krajewski et al. 2024 (`experiments.optimal`
counts so too); points stand at the FLOPs that the runs have in their table.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.optimal import fitted_families
from moejax.scaling import FORMS, Budget, Choice, Family, Fit, Law, ranked

_INK, _SOFT, _RULE = '#1c1d20', '#6b6f76', '#e4e4e0'
_DRAWS = 30  # resampled fits of which the optimum is drawn
_NAMES = {'G': 'granularity G', 'E': 'expansion rate E'}


def write_plots(folder: Path, record: dict[str, Any], result: Fit) -> list[Path]:
  """Draws what this law has; returns the files."""
  pictures: dict[str, Callable[[Axes, dict[str, Any], Fit], None]] = {
    'loss_by_flops': _loss_by_flops,
    'predicted': _predicted,
  }
  if 'D' in FORMS[record['law']].columns:
    pictures['iso_flops'] = _iso_flops
    if _varied(record) in FORMS[record['law']].columns:
      pictures['optimum'] = _optimum
  files = []
  for name, draw in sorted(pictures.items()):
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout='constrained')
    axes = figure.add_subplot()
    _style(axes)
    draw(axes, record, result)
    files.append(folder / f'{name}.png')
    figure.savefig(files[-1])
  return files


def _varied(record: dict[str, Any]) -> str:
  """What colours stand for."""
  return 'E' if 'E' in FORMS[record['law']].columns else 'G'


def _used(record: dict[str, Any]) -> list[dict[str, Any]]:
  return [row for row in record['rows'] if not row['excluded']]


def _colours(values: list[float]) -> dict[float, tuple[float, float, float]]:
  """From blue over violet to orange, as in the report of a run."""
  hues = (215 + 170 * index / max(1, len(values) - 1) for index in range(len(values)))
  return {
    value: colorsys.hls_to_rgb((hue % 360) / 360, 0.52, 0.68)
    for value, hue in zip(values, hues, strict=True)
  }


def _groups(record: dict[str, Any]) -> Iterator[tuple[float, Any, list[dict[str, Any]]]]:
  """(value of G or E, its colour, its runs)."""
  key, rows = _varied(record), _used(record)
  values = sorted({row[key] for row in rows})
  for value, colour in _colours(values).items():
    yield value, colour, [row for row in rows if row[key] == value]


def _loss_by_flops(axes: Axes, record: dict[str, Any], result: Fit) -> None:
  key, form, size = _varied(record), FORMS[record['law']], record['size']
  for value, colour, rows in _groups(record):
    _points(axes, rows, 'flops', 'eval_loss', colour, f'{key} = {value:g}')
    for N in sorted({row[size] for row in rows}):
      alike = [row for row in rows if row[size] == N]
      if 'D' not in form.columns or len({row['D'] for row in alike}) < 2:
        continue
      D = np.geomspace(min(row['D'] for row in alike), max(row['D'] for row in alike), 40)
      a_token = np.median([row['flops'] / row['D'] for row in alike])
      sizes = {'N': N, 'D': D, 'E': alike[0]['E'], 'G': alike[0]['G']}
      loss = result.law(**{name: sizes[name] for name in form.columns})
      axes.plot(a_token * D, loss, color=colour, lw=0.9, alpha=0.7)
  axes.set(xscale='log', xlabel='training FLOPs of the run', ylabel='evaluation loss, nats a token')
  held = f'{record["held_out"]} runs held out are hollow'
  _title(axes, 'Loss against FLOPs', f'lines: law {record["law"]} for each size; {held}')
  _legend(axes)


def _predicted(axes: Axes, record: dict[str, Any], result: Fit) -> None:
  key = _varied(record)
  rows = _used(record)
  for value, colour, group in _groups(record):
    shown = [
      {**row, 'predicted': row['predicted_unseen'] if row['held_out'] else row['predicted']}
      for row in group
    ]
    _points(axes, shown, 'eval_loss', 'predicted', colour, f'{key} = {value:g}')
  ends = [f(row['eval_loss'] for row in rows) for f in (min, max)]
  axes.plot(ends, ends, color=_SOFT, lw=0.9, zorder=0)
  axes.set(xlabel='measured loss, nats a token', ylabel='predicted loss, nats a token')
  note = (
    f'RMSE {record["rmse"]:.4f} of the fit to all {record["runs"]} runs; hollow: {record["held_out"]} runs that a '
    f'second fit did not see, RMSE {record["held_out_rmse"]:.4f}'
  )
  _title(axes, 'Predicted against measured', note)
  _legend(axes)


def _iso_flops(axes: Axes, record: dict[str, Any], result: Fit) -> None:
  flops = [row['flops'] for row in _used(record)]
  budgets = np.geomspace(min(flops), max(flops), 5)
  for budget, colour in _colours(list(budgets)).items():
    families = fitted_families(record, result.law)
    best = ranked(families, Budget(budget))[0]
    for family, dashes, label in _compared(families, best, record, budget):
      width = best.width * np.geomspace(0.45, 2.2, 120)
      counts = family.count(width)
      loss = family.loss(counts.N, budget / counts.training_flops)
      axes.plot(counts.active, loss, color=colour, lw=1.5, ls=dashes, label=label)
    axes.plot(best.active, best.loss, 'o', color=colour, ms=5)
  axes.set(
    xscale='log',
    xlabel='active parameters, without embedding and head',
    ylabel='loss by the law, nats a token',
  )
  note = f'law {record["law"]}; dots: the optimum'
  if len(fitted_families(record, result.law)) > 1:
    note += f'; dashed: {_varied(record)} = 1'
  _title(axes, 'Iso-FLOP curves', note)
  _legend(axes)


def _compared(families: list[Family], best: Choice, record: dict[str, Any], budget: float):
  """The best family of a budget, and dashed the one of the least G or E."""
  key = _varied(record)
  least = min(families, key=lambda family: getattr(family, key))
  chosen = next(family for family in families if (family.E, family.G) == (best.E, best.G))
  several = len(families) > 1
  yield chosen, '-', f'{budget:.1e} FLOPs' + f', {key} = {getattr(best, key):g}' * several
  if several and least is not chosen:
    yield least, (0, (4, 2)), None


def _optimum(axes: Axes, record: dict[str, Any], result: Fit) -> None:
  key = _varied(record)
  flops = [row['flops'] for row in _used(record)]
  budgets = np.geomspace(min(flops) / 10, max(flops) * 1000, 25)
  axes.axvspan(min(flops), max(flops), color=_RULE, alpha=0.6, lw=0, label='FLOPs of the runs')

  def best(law: Law) -> list[float]:
    families = fitted_families(record, law)
    return [getattr(ranked(families, Budget(budget))[0], key) for budget in budgets]

  if result.draws:
    samples = np.array([best(law) for law in result.draws[:_DRAWS]])
    low, high = np.percentile(samples, (10, 90), axis=0, method='nearest')
    blue = _colours([0.0])[0.0]
    axes.fill_between(
      budgets,
      low,
      high,
      step='mid',
      color=blue,
      alpha=0.16,
      lw=0,
      label=f'10th to 90th percentile of {len(samples)} resampled fits',
    )
  axes.step(budgets, best(result.law), where='mid', color=_colours([0.0])[0.0], label='fit')
  values = [getattr(family, key) for family in fitted_families(record, result.law)]
  axes.set(xscale='log', xlabel='training FLOPs', ylabel=f'optimal {_NAMES[key]}')
  axes.set_yscale('log', base=2)
  axes.set_yticks(values, [f'{value:g}' for value in values])
  axes.set_ylim(min(values) / 1.3, max(values) * 1.3)
  ran = sorted({row[key] for row in _used(record)})
  _title(
    axes, f'Optimal {_NAMES[key]}', f'law {record["law"]}; runs had {key} {ran[0]:g} to {ran[-1]:g}'
  )
  axes.legend(frameon=False, fontsize=8, loc='upper center', bbox_to_anchor=(0.5, -0.14), ncols=3)


def _points(
  axes: Axes, rows: list[dict[str, Any]], x: str, y: str, colour: Any, label: str
) -> None:
  """A dot a run, hollow where it was held out."""
  for held_out in (False, True):
    some = [row for row in rows if row['held_out'] == held_out]
    axes.scatter(
      [row[x] for row in some],
      [row[y] for row in some],
      s=22,
      facecolors='white' if held_out else [colour],
      edgecolors=[colour],
      linewidths=1.1,
      zorder=3,
      label=None if held_out else label,
    )


def _style(axes: Axes) -> None:
  axes.grid(True, color=_RULE, lw=0.8)
  axes.set_axisbelow(True)
  for side in ('top', 'right'):
    axes.spines[side].set_visible(False)
  for side in ('left', 'bottom'):
    axes.spines[side].set_color(_SOFT)
  axes.tick_params(colors=_SOFT, labelsize=9, which='both')


def _title(axes: Axes, title: str, note: str) -> None:
  axes.set_title(f'{title}\n', loc='left', fontsize=12, color=_INK, fontweight='bold')
  axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=8, color=_SOFT)


def _legend(axes: Axes) -> None:
  axes.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1.0, 0.5))
