"""Where a training step fits, what it moves and how long it takes, before the machine is rented.

  python -m experiments.plan --config configs/scale/kimi_1t.py --topology v5p:16x16x16
  python -m experiments.plan --config configs/scale/mixtral_8x7b.py --topology h100:8x16
  python -m experiments.plan --config configs/scale/olmoe_1b_7b.py --topology v5p:2x2x4 --check

Every mesh, exchange and number of microbatches that fits is ranked by an analytic model. `--check` compiles the best
one (or with `--layout=config` the config's own) for the topology, with libtpu and without a TPU, and compares: it fails
where a large collective or the memory is not as predicted. Experts run as padded blocks where a platform has
no kernel of its own (pallas_kernels/registry.py), which shows in the plan; `--kernels` supposes one.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from experiments import cli
from experiments.errors import BadInput, ExperimentError
from experiments.planning import report
from experiments.planning.chips import Topology, accepted, parse_topology
from experiments.planning.compiled import LIVES, Comparison, compare, compile_step
from experiments.planning.page import write_page
from experiments.planning.search import describe, own_layout, plan_of, search
from experiments.planning.workload import Layout, Workload, workload
from experiments.workdir import config_name

TRAFFIC_ERROR = 0.05
"""Relative error of a collective's bytes that `--check` lets pass."""

UNDER, OVER = 0.01, 0.6
"""The same of memory, which is estimated from above: a plan that is a little too large never starts."""

STATE_ERROR = 0.01


class PredictionMissed(ExperimentError):
  """The compiled step is not what the analytic model says."""

  exit_code = 18


def main(argv: list[str]) -> int:
  settings, _, workdir, own = cli.parse(
    argv,
    'experiments.plan',
    _define,
    workdir='a run to plan for, in place of --config; nothing is written there',
  )
  if not own['topology']:
    raise BadInput(f'--topology is missing: it must be {accepted()}')
  if own['layout'] not in ('best', 'config'):
    raise BadInput(f'--layout={own["layout"]} is not accepted: it must be best or config')
  topology = parse_topology(own['topology'])
  if own['kernels'] and own['check']:
    raise BadInput(
      '--kernels with --check is not accepted: what is compiled has the default bodies'
    )
  if own['show-sharding'] and own['check']:
    raise BadInput('--show-sharding with --check is not accepted: it prints and compiles nothing')
  work = workload(settings, topology.chip.kind, kernels=own['kernels'])
  name = config_name(workdir)
  print(report.heading(name, work, topology))
  if own['layout'] == 'config':
    plans = [plan_of(work, own_layout(settings, topology.devices), topology)]
  else:
    plans = search(work, topology)
  best = plans[0]
  if own['show-sharding']:
    print(f'\n{describe(best.layout)}\n\n{report.sharding_lines(work, best.layout)}')
    return 0
  print(f'\n{report.ranked(plans[: own["top"]])}\n{len(plans)} layouts fit; a step takes')
  print('the longer of matmul and memory, and the network; at least the longest of the three.')
  print(f'\nThe best, to paste:\n{report.to_paste(work, best.layout)}')
  for note in report.notes(work, best.layout):
    print(f'\n{note}')
  print(f'\n{report.memory_lines(best)}\n\n{report.traffic_lines(work, best)}')
  page = Path(own['page'] or f'runs/plan-{name}-{topology.name.replace(":", "-")}.html')
  write_page(page, name, work, topology, plans)
  print(f'\n{page}')
  if own['check']:
    check(work, best.layout, topology)
  return 0


def check(work: Workload, layout: Layout, topology: Topology) -> None:
  """Compiles the step and compares; prints both.

  Raises:
    PredictionMissed: a figure is further off than the module's constants allow.
  """
  found = compile_step(work.settings, layout, topology)
  compared = compare(work, layout, found)
  print(f'\n{report.comparison_lines(found, compared)}')
  wrong = [one for one in compared if missed(one)]
  if wrong:
    worst = max(wrong, key=lambda one: abs(one.error))
    low, high = allowed(worst)
    raise PredictionMissed(
      f'{worst.what}: {worst.predicted / 2**30:.3f} GiB predicted, {worst.compiled / 2**30:.3f} GiB compiled: '
      f'{worst.error:+.0%}, accepted are {-low:+.0%} to {high:+.0%}'
    )


def allowed(one: Comparison) -> tuple[float, float]:
  """How far below and above what was compiled a prediction may be."""
  if one.what == LIVES:
    return UNDER, OVER
  error = STATE_ERROR if one.what == 'state' else TRAFFIC_ERROR
  return error, error


def missed(one: Comparison) -> bool:
  """Whether a figure is further off than that."""
  low, high = allowed(one)
  return not -low <= one.error <= high


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_string('topology', '', f'devices: {accepted()}', flag_values=values)
  flags.DEFINE_boolean(
    'show-sharding',
    False,
    'print parameter, rule, spec and bytes a device instead',
    flag_values=values,
  )
  flags.DEFINE_boolean(
    'kernels',
    False,
    'suppose kernels for experts that skip padding and rows of others',
    flag_values=values,
  )
  flags.DEFINE_boolean('check', False, 'compile for the topology and compare', flag_values=values)
  flags.DEFINE_string(
    'layout', 'best', 'best, or config for its own mesh alone', flag_values=values
  )
  flags.DEFINE_integer('top', 12, 'lines of the table', 1, flag_values=values)
  flags.DEFINE_string('page', '', 'HTML file to write; else under runs/', flag_values=values)


if __name__ == '__main__':
  cli.run(main)
