"""What a plan says, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from experiments.planning.chips import Topology
from experiments.planning.compiled import Comparison, Compiled
from experiments.planning.exchanges import hops, hot, sizes_of
from experiments.planning.memory import GROUPS
from experiments.planning.moves import by_kind
from experiments.planning.search import Plan, describe
from experiments.planning.traffic import moves
from experiments.planning.workload import Layout, Workload
from moejax.moe.exchange import exchange_options

GIB = 2**30


def table(rows: Sequence[Sequence[str]]) -> str:
  """Columns of equal width, the first row their names; numbers to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = []
  for row in rows:
    cells = [
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append('  '.join(cells).rstrip())
  return '\n'.join(lines)


def heading(name: str, work: Workload, topology: Topology) -> str:
  """Model and machine in two lines."""
  total = sum(tensor.size for tensor in work.tensors if tensor.trained)
  chip = topology.chip
  tokens = work.settings.batch_size * work.settings.data.sequence_length
  experts = (
    'run as padded blocks' if work.blocks else 'have kernels that skip padding and rows of others'
  )
  return (
    f'{name}: {total:,} parameters, {tokens:,} tokens and {work.flops:.2e} model '
    f'FLOPs a step; experts {experts}\n'
    f'{topology.name}: {topology.devices:,} devices of {chip.peak / 1e12:,.0f} TFLOP/s (bfloat16), '
    f'{chip.memory / GIB:.0f} GiB at {chip.memory_rate / 1e12:.2f} TB/s; {chip.source}'
  )


def ranked(plans: Sequence[Plan]) -> str:
  """One line a layout, the fastest first."""
  rows = [('layout', 'GiB', 'step s', 'matmul s', 'memory s', 'network s', 'at least s', 'MFU')]
  for plan in plans:
    found = plan.times
    rows.append(
      (
        describe(plan.layout),
        f'{plan.bytes / GIB:.1f}',
        f'{found.total:.3g}',
        f'{found.matmul:.3g}',
        f'{found.memory:.3g}',
        f'{sum(found.network.values()):.3g}',
        f'{found.least:.3g}',
        f'{found.mfu:.1%}',
      )
    )
  return table(rows)


def to_paste(work: Workload, layout: Layout) -> str:
  """The layout as overrides of a config."""
  lines = [f'--config.mesh.{axis}={size}' for axis, size in layout.sizes.items()]
  lines.append(f'--config.model.moe.exchange={layout.exchange}')
  if layout.expert > 1:
    options = sizes_of(work.settings, layout)
    lines += [f'--config.model.moe.exchange_options.{key}={options[key]}' for key in options]
  lines.append(f'--config.microbatches={layout.microbatches}')
  return ' \\\n'.join(lines)


def notes(work: Workload, layout: Layout) -> list[str]:
  """What the figures of this layout suppose, a sentence each."""
  said = list(_of_exchange(work, layout)) if layout.expert > 1 else []
  if layout.tensor > 1 and work.settings.model.attention == 'latent':
    said.append(
      'Of latent attention over the axis tensor two steps were compiled: from what size on its gathers and sums become '
      'permutations is a guess.'
    )
  if layout.tensor > 1 and work.settings.model.depth_layers:
    said.append(
      'Of blocks that tokens skip no step was compiled over the axis tensor: what their routers send there is left out.'
    )
  moe = work.settings.model.moe
  left = sorted({*moe.exchange_options}.difference(exchange_options(layout.exchange)))
  if left:
    said.append(
      f'{layout.exchange} does not take model.moe.exchange_options of the config: {", ".join(left)} must go.'
    )
  return said


def _of_exchange(work: Workload, layout: Layout) -> Iterator[str]:
  rows = work.tokens(layout) * work.choices
  found, name = hops(work, layout), layout.exchange
  if name in ('all_to_all', 'bilevel', 'sparse_fsdp'):
    factors = ' and '.join(f'{hop.places / rows:g}' for hop in found)
    yield (
      f'{name} has places for {factors} times the mean load (model.moe.exchange_options); rows beyond are lost, and '
      'counted.'
    )
  if name == 'bilevel':
    outer, inner = (hop.size for hop in found)
    yield (
      f'A device sends {outer - 1} messages between {outer} nodes and {inner - 1} inside of its own, where all_to_all '
      f'has {layout.expert - 1}; times are of bytes alone, of which two hops send more.'
    )
  if name == 'sparse_fsdp':
    yield (
      f'Rows of the {hot(work, layout)} hottest experts stay where they are, which shapes do not tell: all rows have '
      'places in both ways.'
    )
  if name == 'ragged_fallback':
    yield (
      f'Rows are taken to find place: a device has room for {found[0].places / rows:g} times the mean load. In a step '
      'with more all tokens are gathered beside, whose buffers count here, and whose time and bytes do not.'
    )


def memory_lines(plan: Plan) -> str:
  rows = [('memory of a device', 'GiB')]
  rows += [(name, f'{plan.memory[name] / GIB:.2f}') for name in GROUPS]
  return table([*rows, ('together', f'{plan.bytes / GIB:.2f}')])


def traffic_lines(work: Workload, plan: Plan) -> str:
  """Bytes that a device sends in a step, by collective and axes, and the time of each axis."""
  rows = [('a device sends', 'GB a step')]
  found = by_kind(moves(work, plan.layout))
  for (kind, axes), sent in sorted(found.items(), key=lambda item: -item[1]):
    rows.append((f'{kind} over {"+".join(axes)}', f'{sent / 1e9:.3f}'))
  if len(rows) == 1:
    rows.append(('nothing', '0'))
  return table(rows)


def sharding_lines(work: Workload, layout: Layout) -> str:
  """Every parameter with the rule it matches, the axes that cut it and what is left to a device."""
  rows = [('parameter', 'shape', 'rule', 'spec', 'MiB a device')]
  for tensor in work.tensors:
    spec = ', '.join('+'.join(axes) or '-' for axes in tensor.axes)
    width = 4 * tensor.size / tensor.shards(layout.sizes) / 2**20
    rows.append((tensor.path, 'x'.join(map(str, tensor.shape)), tensor.rule, spec, f'{width:.3f}'))
  return table(rows)


def comparison_lines(found: Compiled, compared: Sequence[Comparison]) -> str:
  """Predicted and compiled figures side by side."""
  rows = [('per device', 'predicted GiB', 'compiled GiB', 'error')]
  for one in compared:
    rows.append(
      (one.what, f'{one.predicted / GIB:.3f}', f'{one.compiled / GIB:.3f}', f'{one.error:+.1%}')
    )
  here = f'compiled in {found.seconds:.0f} s and {found.host / GIB:.1f} GiB of memory here'
  return f'{here}; most that lives at once there: {found.peak / GIB:.1f} GiB\n{table(rows)}'
