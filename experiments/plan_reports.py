"""The committed plans of the scale configs: pages, a table and the errors of the analytic model.

  python -m experiments.plan_reports [--out experiments/results/plans] [--compile NAME ...]

Plans are computed in seconds; what was compiled stays in result.json until `--compile` names a case to compile again
(minutes each, with libtpu).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments import cli
from experiments.arguments import Arguments
from experiments.errors import BadInput
from experiments.planning import report
from experiments.planning.chips import Topology, parse_topology
from experiments.planning.compiled import Compiled, compare, compile_step
from experiments.planning.page import write_page
from experiments.planning.search import describe, search
from experiments.planning.traffic import FUSED
from experiments.planning.workload import Layout, Workload, workload
from experiments.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'experiments' / 'results' / 'plans'

PLANNED: dict[str, tuple[str, ...]] = {
  'mixtral_8x7b': ('v5p:4x4x4', 'h100:8x16'),
  'olmoe_1b_7b': ('v5p:2x2x4', 'h100:8x2'),
  'deepseek_v3_671b': ('v5p:8x8x16', 'b200:8x64'),
  'qwen3_235b': ('v5p:8x8x8', 'h200:8x32'),
  'kimi_1t': ('v5p:16x16x16', 'b200:8x128'),
  'ling_300b': ('v5p:8x8x8', 'h200:8x32'),
}
"""Config -> the topologies it is planned for."""


@dataclasses.dataclass(frozen=True)
class Case:
  """A step that was compiled, to check the analytic model."""

  config: str
  topology: str
  layout: Layout
  batch_size: int = 0  # 0: as the config has it

  def settings(self) -> Settings:
    changes = {'batch_size': self.batch_size} if self.batch_size else {}
    changes['microbatches'] = self.layout.microbatches
    return settings_of(self.config, changes)


def _case(
  config: str,
  topology: str,
  mesh: tuple[int, int, int],
  microbatches: int,
  batch: int = 0,
  exchange: str = 'all_gather',
) -> Case:
  sizes = dict(zip(('data', 'fsdp', 'expert'), mesh, strict=True))
  return Case(config, topology, Layout(sizes, exchange, microbatches), batch)


CASES: dict[str, Case] = {
  'olmoe': _case('olmoe_1b_7b', 'v5p:2x2x4', (1, 4, 4), 64),
  'olmoe_data': _case('olmoe_1b_7b', 'v5p:2x2x4', (2, 4, 2), 1, 16),
  'olmoe_local': _case('olmoe_1b_7b', 'v5p:2x2x4', (1, 16, 1), 4, 0, 'local'),
  'kimi': _case('kimi_1t', 'v5p:16x16x16', (1, 512, 8), 4),
}
"""Short name -> what is compiled."""


_LESSONS = (
  "Two sums travel more than they must: the embedding's gradient, a whole float32 table over all devices in every "
  f'microbatch, and that of the head where `fsdp` is longer than {FUSED}.'
)


def settings_of(name: str, changes: Mapping[str, Any]) -> Settings:
  """The settings of one scale config with these changes."""
  (config,) = cli.execute(ROOT / f'configs/scale/{name}.py', 'a config', ('get_config',))
  assert isinstance(config, ConfigDict)
  config.update_from_flattened_dict(dict(changes))
  return Settings.from_config(config)


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
  if kernels:
    write_page(out / page, name, work, topology, plans)
  best = plans[0]
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
    'second table were compared with a compiled step.',
    '',
    '| config | machine | devices | experts | layout | GiB a device | step s | matmul | memory | network | MFU '
    '| layouts |',
    '|---|---|---|---|---|---|---|---|---|---|---|---|',
  ]
  for row in result['plans']:
    page = f'{row["config"]}-{row["topology"].replace(":", "-")}.html'
    start = (
      f'| [{row["config"]}]({page}) | {row["topology"]} | {row["devices"]:,} | {row["experts"]} '
    )
    if 'answer' in row:
      lines.append(f'{start}| {row["answer"]} | | | | | | | |')
      continue
    network = sum(row['network'].values())
    lines.append(
      f'{start}| {row["layout"]} | {row["gib"]} '
      f'| {row["seconds"]} | {row["matmul"]} | {row["memory"]} | {network:.3g} | {row["mfu"]:.1%} | {row["layouts"]} |'
    )
  lines += ['', '## Errors of the model', '', *_errors(result['compiled'])]
  lines += ['', _LESSONS]
  lines += [
    '',
    '```sh',
    'scripts/python -m experiments.plan_reports',
    '```',
    '',
    'writes this folder; `--compile NAME` compiles a case of the second table again (with the extra `tpu`).',
  ]
  return '\n'.join(lines) + '\n'


def _errors(compiled: Mapping[str, Any]) -> list[str]:
  lines = [
    'The real step, optimizer and recomputation included, compiled for the topology with libtpu on two x86-64 cores '
    'without a TPU. Bytes of one device; of collectives those that it sends in a step.',
    '',
    '| case | figure | predicted GiB | compiled GiB | error |',
    '|---|---|---|---|---|',
  ]
  for name, values in compiled.items():
    case, _, topology, rows = compared(name, values)
    what = f'{case.config} on {topology.name}, {describe(case.layout)}'
    took = (
      f'compiled in {values["seconds"]:.0f} s with {values["host"] / report.GIB:.1f} GiB of memory'
    )
    lines.append(
      f'| {what} | most that lives at once | | {values["peak"] / report.GIB:.1f} | {took} |'
    )
    for one in rows:
      lines.append(
        f'| | {one.what} | {one.predicted / report.GIB:.2f} | {one.compiled / report.GIB:.2f} | {one.error:+.1%} |'
      )
  return lines


def _arguments() -> Arguments:
  parser = Arguments('experiments.plan_reports', __doc__)
  parser.add_argument('--out', default=str(OUT), help='folder to write')
  parser.add_argument('--compile', nargs='*', choices=sorted(CASES), help='cases to compile again')
  return parser


if __name__ == '__main__':
  cli.run(main)
