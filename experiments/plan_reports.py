"""The committed plans of the scale configs: pages, a table and the errors of the analytic model.

  python -m experiments.plan_reports [--out experiments/results/plans] [--compile NAME ...]

Plans are computed anew; what was compiled stays in result.json until `--compile` names a case to compile again, with
libtpu.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import cli
from experiments.arguments import Arguments
from experiments.errors import BadInput
from experiments.planning import report
from experiments.planning.cases import CASES, PLANNED, ROOT, RUNS, Case, Run, settings_of
from experiments.planning.chips import Topology, parse_topology
from experiments.planning.compiled import (
  Compiled,
  compare,
  compile_step,
  expected_by_size,
  scattered,
)
from experiments.planning.page import write_page
from experiments.planning.roofline import Times
from experiments.planning.search import describe, search
from experiments.planning.workload import Workload, workload

OUT = ROOT / 'experiments' / 'results' / 'plans'
COMMAND = 'scripts/python -m experiments.plan_reports'

_COMPILED = (
  'The real step, optimizer and recomputation included, compiled for the topology with libtpu on one or two x86-64 '
  'cores without a TPU; how long that took, and the most memory of the process. The compiler refuses a step of which '
  'more lives at once than the device has, so all of these fit; the plan estimates that memory from above. Bytes of '
  'one device; of collectives those that it sends in a step, those left out that are less than 2 % of all, and '
  'permutations. A sum counts once, whether it is scattered or whole on every device. Of the first table the buffers '
  'of a step were estimated so that none of its steps lives with more.'
)
_HELD_OUT = (
  'Nothing in the model was set by these steps: figures were predicted, and then compiled. Later the estimate of '
  'memory was changed, and the gathers for shared experts, by steps of the first table. Narrow is a config with 4 '
  'layers of 1,024, sequences of 512 and a vocabulary of 8,192.'
)
_LESSONS = (
  "What travels more than it must: the embedding's gradient, a whole float32 table over all devices in every "
  'microbatch; sums that the compiler leaves whole on every device though each keeps a shard alone, which shapes do '
  'not tell; gathers over a whole pod of three dimensions, which it writes as sums of shards among zeros; and beside '
  'the axis `tensor`, float32 logits where the batch is sharded over more axes than `fsdp`, since '
  'tokens are cut by model width there and the head is not. Not predicted either: where it gathers the table to look '
  'tokens up, which is what narrow steps send more over `fsdp`. Of an exchange with a fallback only what every step '
  'sends is compared.'
)


def main(argv: list[str]) -> int:
  options = _arguments().parse_args(argv[1:])
  out = Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  before = json.loads((out / 'result.json').read_text()) if (out / 'result.json').is_file() else {}
  compiled = dict(before.get('compiled', {}))
  for name in options.compile or ():
    case = CASES[name]
    found = compile_step(case.settings(), case.layout, parse_topology(case.topology))
    compiled[name] = as_json(found)
  plans = [
    planned(name, topology, out, kernels)
    for name, names in PLANNED.items()
    for topology in names
    for kernels in (False, True)
  ]
  result = {
    'command': COMMAND,
    'plans': plans,
    'compiled': {name: compiled[name] for name in CASES if name in compiled},
  }
  (out / 'result.json').write_text(json.dumps(result, indent=1) + '\n', encoding='utf-8')
  (out / 'README.md').write_text(readme(result), encoding='utf-8')
  print(out / 'README.md')
  return 0


def planned(name: str, topology_name: str, out: Path, kernels: bool) -> dict[str, Any]:
  """One row of the table; with kernels it also writes the page."""
  settings, topology = settings_of(name, {}), parse_topology(topology_name)
  work = workload(settings, topology.chip.kind, kernels=kernels)
  row: dict[str, Any] = {'config': name, 'topology': topology_name, 'devices': topology.devices}
  row['experts'] = 'blocks' if work.blocks else 'kernels'
  try:
    plans = search(work, topology)
  except BadInput as error:
    return row | {'answer': str(error)}
  page = f'{name}-{topology_name.replace(":", "-")}.html'
  best = plans[0]
  run = RUNS.get((name, topology_name))
  against = against_run(run, work, topology, best.times) if run else []
  if kernels:
    write_page(out / page, name, work, topology, plans, against)
  row |= {'against': ' '.join(against)} if against else {}
  return row | {
    'layout': describe(best.layout),
    'gib': round(best.bytes / report.GIB, 1),
    'seconds': float(f'{best.times.total:.3g}'),
    'matmul': float(f'{best.times.matmul:.3g}'),
    'memory': float(f'{best.times.memory:.3g}'),
    'network': {axes: float(f'{value:.3g}') for axes, value in best.times.network.items()},
    'mfu': round(best.times.mfu, 3),
    'layouts': len(plans),
  }


def against_run(run: Run, work: Workload, topology: Topology, times: Times) -> list[str]:
  """The plan's device hours for the tokens of a published run, over those that it took."""
  steps = run.tokens / (work.settings.batch_size * work.settings.data.sequence_length)
  seconds = (times.total, times.least, times.matmul)
  hours = [steps * each * topology.devices / 3600 for each in seconds]
  return [
    f'{run.tokens / 1e12:.1f}T tokens would take {hours[0] / 1e3:,.0f}K device hours, {hours[1] / 1e3:,.0f}K if all '
    f'overlaps, {hours[2] / 1e3:,.0f}K of matrix products alone. Published are {run.hours / 1e3:,.0f}K ({run.source}): '
    f'the plan is {hours[0] / run.hours:.2f}, {hours[1] / run.hours:.2f} and {hours[2] / run.hours:.2f} times that.',
    f'The run {run.differs}.',
    f'Of the {times.total:.3g} s of a step {sum(times.network.values()):.3g} are network, none of it hidden here.',
  ]


def as_json(found: Compiled) -> dict[str, Any]:
  """Figures of a compiled step; collectives as [kind, devices, bytes]."""
  values = dataclasses.asdict(found)
  sent = sorted(found.sent.items(), key=lambda item: -item[1])
  return values | {'sent': [[*key, round(value)] for key, value in sent]}


def from_json(values: Mapping[str, Any]) -> Compiled:
  sent = {(kind, size): float(value) for kind, size, value in values['sent']}
  return Compiled(**{**values, 'sent': sent})


def compared(name: str, values: Mapping[str, Any]) -> tuple[Case, Workload, Topology, list]:
  """A case, and its predictions beside what was compiled."""
  case = CASES[name]
  work, topology = workload(case.settings(), 'tpu'), parse_topology(case.topology)
  return case, work, topology, compare(work, case.layout, from_json(values))


def readme(result: Mapping[str, Any]) -> str:
  """The page: best layouts, and the errors of the model."""
  lines = [
    '# Plans of the scale configs',
    '',
    'The fastest layout of each config on machines that hold it, by the analytic model of `experiments.plan`. Nothing '
    'was trained; the pages have the alternatives, traffic and sharding. Experts run as padded blocks where a platform '
    'has no kernel of its own: these work on rows that others have, and copy weights. Second lines suppose kernels '
    '(`--kernels`); their memory is by shapes alone, for none was compiled. Of axes and exchanges, only those of the '
    'tables below were compared with a compiled step, and none of GPUs.',
    '',
    '| config | machine | devices | experts | layout | GiB a device | step s | matmul | memory | network | MFU '
    '| layouts |',
    '|---|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  against: list[str] = []
  for row in result['plans']:
    page = f'{row["config"]}-{row["topology"].replace(":", "-")}.html'
    start = (
      f'| [{row["config"]}]({page}) | {row["topology"]} | {row["devices"]:,} | {row["experts"]} '
    )
    if 'answer' in row:
      lines.append(f'{start}| {row["answer"]} | | | | | | | |')
      continue
    network = sum(row['network'].values())
    against += (
      [f'{row["config"]} on {row["topology"]}, {row["experts"]}: {row["against"]}']
      if 'against' in row
      else []
    )
    lines.append(
      f'{start}| {row["layout"]} | {row["gib"]} '
      f'| {row["seconds"]} | {row["matmul"]} | {row["memory"]} | {network:.3g} | {row["mfu"]:.1%} | {row["layouts"]} |'
    )
  lines += ['', '## Against a published run', '', *against] if against else []
  lines += ['', '## Errors of the model', '', _COMPILED, '']
  lines += _errors(result['compiled'], held_out=False)
  lines += ['', '## Layouts that were predicted first', '', _HELD_OUT, '']
  lines += _errors(result['compiled'], held_out=True)
  lines += ['', _LESSONS]
  lines += [
    '',
    f'```sh\n{COMMAND}\n```',
    '',
    'writes this folder; `--compile NAME` compiles a case of the second table again (with the extra `tpu`).',
  ]
  return '\n'.join(lines) + '\n'


def _errors(compiled: Mapping[str, Any], *, held_out: bool) -> list[str]:
  lines = ['| case | figure | predicted GiB | compiled GiB | error |', '|---|---|---|---|---|']
  for name, values in compiled.items():
    case, work, topology, rows = compared(name, values)
    if case.held_out != held_out:
      continue
    took = f'compiled in {values["seconds"]:.0f} s with {values["host"] / report.GIB:.1f} GiB'
    lines.append(f'| {case.name} on {topology.name}, {describe(case.layout)} | | | | {took} |')
    for one in rows:
      found = (one.predicted / report.GIB, one.compiled / report.GIB)
      lines.append(f'| | {one.what} | {found[0]:.3g} | {found[1]:.3g} | {one.error:+.1%} |')
    sums = [scattered(expected_by_size(work, case.layout)), scattered(from_json(values).sent)]
    lines.append(f'| | of sums, scattered | {sums[0]:.0%} | {sums[1]:.0%} | |')
  return lines


def _arguments() -> Arguments:
  parser = Arguments('experiments.plan_reports', __doc__)
  parser.add_argument('--out', default=str(OUT), help='folder to write')
  parser.add_argument('--compile', nargs='*', choices=sorted(CASES), help='cases to compile again')
  return parser


if __name__ == '__main__':
  cli.run(main)
