"""The plan as one HTML page: no network, no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.planning import report
from experiments.planning.chips import Topology
from experiments.planning.memory import GROUPS
from experiments.planning.moves import by_kind
from experiments.planning.search import Plan, describe
from experiments.planning.traffic import moves
from experiments.planning.workload import Workload
from experiments.report_page import STYLE
from experiments.workdir import make_folder, write_text

COLOURS = ('#4269d0', '#efb118', '#ff725c', '#6cc5b0', '#a463f2')
SHOWN = 12
_OWN = """
table { border-collapse: collapse; width: 100%; background: var(--card); border: 1px solid var(--rule);
  font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 5px 10px; text-align: right; border-top: 1px solid var(--rule); white-space: nowrap; }
th { color: var(--soft); font-weight: 550; border-top: 0; } th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; border-radius: 10px; }
.bar { display: flex; height: 22px; border-radius: 5px; overflow: hidden; background: var(--rule); margin: 4px 0; }
.bar i { background: var(--c); display: block; }
.row { display: grid; grid-template-columns: minmax(180px, 44%) 1fr 74px; gap: 12px; align-items: center;
  font-size: 13px; line-height: 1.25; padding: 2px 0; }
.row span:last-child { text-align: right; font-variant-numeric: tabular-nums; }
.legend { margin-bottom: 8px; }
.legend span { margin-right: 18px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; background: var(--c);
  margin-right: 6px; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 16px;
  overflow-x: auto; }
th.rule, td.rule { text-align: left; }
td.rule { font-family: ui-monospace, Menlo, monospace; font-size: 12px; white-space: normal; overflow-wrap: anywhere;
  min-width: 240px; }
"""


def write_page(
  file: Path,
  name: str,
  work: Workload,
  topology: Topology,
  plans: Sequence[Plan],
  notes: Sequence[str] = (),
) -> None:
  """Writes the page of these plans, the fastest first, with these sentences among its notes.

  Raises:
    StorageError: the file or its folder cannot be written.
  """
  make_folder(file.parent, '--page')
  write_text(file, render(name, work, topology, plans, notes))


def render(
  name: str,
  work: Workload,
  topology: Topology,
  plans: Sequence[Plan],
  notes: Sequence[str] = (),
) -> str:
  best = plans[0]
  said = [*report.notes(work, best.layout), *notes]
  title = html.escape(f'{name} on {topology.name}')
  lines = report.heading(name, work, topology).splitlines()
  body = [
    f'<header><h1>{title}</h1>' + ''.join(f'<p>{html.escape(line)}</p>' for line in lines),
    f'{_tiles(best, topology, len(plans))}</header><main>',
    f'<h2>The best layout, to paste</h2><pre>{html.escape(report.to_paste(work, best.layout))}</pre>',
    ''.join(f'<p>{html.escape(note)}</p>' for note in said),
    f'<h2>Memory of a device</h2>{_memory(best, topology)}',
    f'<h2>Time of a step</h2>{_times(plans[:SHOWN])}',
    '<p>A step takes the longer of matmul and memory, and then the network; the bars show all three.</p>',
    f'<h2>Layouts</h2>{_text_table(report.ranked(plans[:SHOWN]))}',
    f'<h2>What a device of the best layout sends in a step</h2>{_traffic(work, best)}',
    f'<h2>Sharding of the best layout</h2>{_sharding(work, best)}',
  ]
  return (
    f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
    f'<meta name="viewport" content="width=device-width"><style>{STYLE}{_OWN}</style></head><body>'
    f'{"".join(body)}</main></body></html>\n'
  )


def _tiles(best: Plan, topology: Topology, count: int) -> str:
  found = best.times
  tiles = {
    'devices': f'{topology.devices:,}',
    'seconds a step': f'{found.total:.3g}',
    'at the very least': f'{found.least:.3g}',
    'model FLOPs utilisation': f'{found.mfu:.1%}',
    'GiB of a device': f'{best.bytes / report.GIB:.1f} of {topology.chip.memory / report.GIB:.0f}',
    'layouts that fit': f'{count:,}',
  }
  cells = ''.join(f'<div><b>{value}</b><span>{name}</span></div>' for name, value in tiles.items())
  return f'<div class="numbers">{cells}</div>'


def _bars(rows: Sequence[tuple[str, Mapping[str, float], str]], largest: float) -> str:
  """One stacked bar a row: its label, parts by name, and what stands behind it."""
  names = list(rows[0][1])
  colours = dict(zip(names, COLOURS, strict=False))
  legend = ''.join(f'<span style="--c:{colours[name]}"><i></i>{name}</span>' for name in names)
  lines = []
  for label, parts, end in rows:
    cells = ''.join(
      f'<i style="--c:{colours[name]};width:{100 * value / largest:.2f}%" title="{name} {value:.3g}"></i>'
      for name, value in parts.items()
    )
    lines.append(
      f'<div class="row"><span>{html.escape(label)}</span><div class="bar">{cells}</div><span>{end}</span></div>'
    )
  return f'<div class="card"><p class="legend">{legend}</p>{"".join(lines)}</div>'


def _memory(best: Plan, topology: Topology) -> str:
  parts = {f'{name} {best.memory[name] / report.GIB:.1f}': best.memory[name] for name in GROUPS}
  end = f'{best.bytes / report.GIB:.1f} GiB'
  return _bars(
    [(f'of {topology.chip.memory / report.GIB:.0f} GiB', parts, end)], topology.chip.memory
  )


def _times(plans: Sequence[Plan]) -> str:
  rows = []
  for plan in plans:
    found = plan.times
    parts = {
      'matmul': found.matmul,
      'memory': found.memory,
      'network': sum(found.network.values()),
    }
    rows.append((describe(plan.layout), parts, f'{found.total:.3g} s'))
  return _bars(rows, max(sum(parts.values()) for _, parts, _ in rows))


def _table(rows: Sequence[Sequence[str]], rule: int = -1) -> str:
  lines = []
  for index, row in enumerate(rows):
    tag = 'td' if index else 'th'
    cells = (
      f'<{tag}{" class=rule" if i == rule else ""}>{html.escape(cell)}</{tag}>'
      for i, cell in enumerate(row)
    )
    lines.append(f'<tr>{"".join(cells)}</tr>')
  return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _text_table(text: str) -> str:
  return _table([line.split('  ') for line in _squeezed(text)])


def _squeezed(text: str) -> list[str]:
  """Lines of a text table with two blanks between cells."""
  return [
    '  '.join(part.strip() for part in line.split('  ') if part.strip())
    for line in text.splitlines()
  ]


def _traffic(work: Workload, best: Plan) -> str:
  rows = [('collective', 'mesh axes', 'GB')]
  found = by_kind(moves(work, best.layout))
  for (kind, axes), sent in sorted(found.items(), key=lambda item: -item[1]):
    rows.append((kind, ' '.join(axes), f'{sent / 1e9:.3f}'))
  return _table(rows if len(rows) > 1 else [*rows, ('none', '', '0')])


def _sharding(work: Workload, best: Plan) -> str:
  rows = [('parameter', 'shape', 'spec', 'MiB a device', 'rule')]
  for tensor in work.tensors:
    spec = ', '.join('+'.join(axes) or '-' for axes in tensor.axes)
    size = 4 * tensor.size / tensor.shards(best.layout.sizes) / 2**20
    shape = ' '.join(map(str, tensor.shape))
    rows.append((tensor.path, shape, spec, f'{size:.2f}', tensor.rule))
  return _table(rows, rule=4)
