"""Fits a scaling law to a table of runs, says how far to trust it, and draws it.

  python -m experiments.fit --runs DIR_OR_TABLE [--law fine_grained] [--out DIR]

The table is DIR/table.csv of a sweep (experiments/table.py has its columns). DIR/fit.json of the result is what
`python -m experiments.optimal --fit` reads.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.arguments import Arguments, counts, fraction, number, whole
from experiments.errors import BadInput
from experiments.table import Table, read_table
from experiments.workdir import make_folder, write_text
from moejax.scaling import FORMS, Fit, fit_law

SIZE = {
  'chinchilla': 'N',
  'clark': 'N_active',
  'fine_grained': 'N',
  'inference_optimal': 'N_active',
  'joint': 'N_active',
}
"""Law -> the column that is its N. The dense counterpart of a mixture is counted as its active parameters."""


def main(argv: list[str]) -> int:
  options = _arguments().parse_args(argv[1:])
  table = read_table(options.runs, options.diverged_above)
  table, fixed = select(table, options.law, options.experts, options.granularity)
  result = fit(table, options)
  out = options.out or (options.runs if options.runs.is_dir() else options.runs.parent) / 'fit'
  make_folder(out, '--out')
  record = as_record(result, table, options, fixed)
  write_text(out / 'fit.json', json.dumps(record, indent=1, allow_nan=False) + '\n')
  print(describe(result, table, options.law, fixed))
  if not options.no_plots:
    from experiments.fit_plots import write_plots

    print(f'Plots: {", ".join(str(file) for file in write_plots(out, record, result))}')
  return 0


def _arguments() -> Arguments:
  parser = Arguments('experiments.fit', __doc__ or '')
  add = parser.add_argument
  add('--runs', type=Path, required=True, help='folder of a sweep, or its table.csv')
  add('--law', choices=sorted(FORMS), default='fine_grained', help='form of the law')
  add('--out', type=Path, help='where fit.json and plots go; without it fit/ beside the table')
  add('--experts', type=counts, help='take only runs of this E')
  add('--granularity', type=counts, help='take only runs of this G')
  add('--delta', type=number, help="end of the quadratic part of the loss; without it the paper's")
  add('--residuals', choices=('loss', 'log'), help="of the loss or its log; without it the paper's")
  add('--hold_out', type=fraction, default=0.2, help='fraction of the runs held out, the best ones')
  add(
    '--hold_out_by', choices=('loss', 'flops'), default='loss', help='best: least loss, most FLOPs'
  )
  add('--diverged_above', type=number, help='runs of a higher loss have diverged')
  add('--draws', type=whole, default=100, help='bootstrap samples')
  add('--seed', type=whole, default=0, help='of the samples')
  add('--no_plots', action='store_true', help='write fit.json only')
  return parser


def select(
  table: Table, law: str, experts: tuple[int, ...] | None, granularity: tuple[int, ...] | None
) -> tuple[Table, dict[str, float]]:
  """The rows that the law describes, and the values of E and G that it does not know.

  Raises:
    BadInput: no rows are left, or they differ in what the law does not know.
  """
  fixed = {}
  for column, flag, given in (('E', 'experts', experts), ('G', 'granularity', granularity)):
    if given:
      if len(given) > 1:
        raise BadInput(
          f'--{flag}={",".join(map(str, given))} is not accepted: it must be one number'
        )
      table = table.only(column, given[0])
    values = sorted({run.values[column] for run in table.used})
    if column in FORMS[law].columns or not values:
      continue
    if len(values) > 1:
      raise BadInput(
        f'law {law} does not know {column}, and the runs have {column}={", ".join(f"{v:g}" for v in values)}: '
        f'choose one with --{flag}'
      )
    fixed[column] = values[0]
  if not table.used:
    raise BadInput(
      f'of the runs {len(table.runs)} were selected and none of these has finished with a loss'
    )
  return table, fixed


def fit(table: Table, options: Any) -> Fit:
  """The fit to the rows that are not excluded.

  Raises:
    BadInput: too few runs for this law.
  """
  runs = {name: table.column(name) for name in ('D', 'E', 'G')}
  runs['N'] = table.column(SIZE[options.law])
  try:
    return fit_law(
      FORMS[options.law],
      runs,
      table.column('eval_loss'),
      delta=options.delta,
      on_log=None if options.residuals is None else options.residuals == 'log',
      hold_out=options.hold_out,
      hold_out_by=table.column('flops') if options.hold_out_by == 'flops' else None,
      draws=options.draws,
      seed=options.seed,
    )
  except ValueError as error:
    raise BadInput(f'law {options.law}: {error}') from error


def as_record(result: Fit, table: Table, options: Any, fixed: dict[str, float]) -> dict[str, Any]:
  """What fit.json holds."""
  names = FORMS[options.law].names
  rows = _rows(result, table, options.law)
  return {
    'law': options.law,
    'size': SIZE[options.law],
    'fixed': fixed,
    'coefficients': {
      name: {
        'value': getattr(result.law, name),
        'interval': list(result.interval(name)) if result.draws else None,
      }
      for name in names
    },
    'rmse': result.rmse,
    'max_error': result.max_error,
    'held_out_rmse': result.held_out_rmse,
    'held_out': int(result.held_out.sum()),
    'hold_out_by': options.hold_out_by,
    'runs': len(table.used),
    'excluded': len(table.runs) - len(table.used),
    'draws': [[getattr(law, name) for name in names] for law in result.draws],
    'rows': rows,
  }


def _rows(result: Fit, table: Table, law: str) -> list[dict[str, Any]]:
  """Every run of the table, with what the law says of it; null where a run has no number."""
  held_out = iter(result.held_out)
  rows = []
  for run in table.runs:
    row: dict[str, Any] = {'name': run.name, 'seed': run.seed, 'excluded': run.excluded}
    row |= {key: value if np.isfinite(value) else None for key, value in run.values.items()}
    if not run.excluded:
      sizes = {**run.values, 'N': run.values[SIZE[law]]}
      sizes = {key: sizes[key] for key in FORMS[law].columns}
      row['held_out'] = bool(next(held_out))
      row['predicted'] = float(result.law(**sizes))
      row['predicted_unseen'] = float(result.held_out_law(**sizes))
    rows.append(row)
  return rows


def describe(result: Fit, table: Table, law: str, fixed: dict[str, float]) -> str:
  """The fit as lines of text."""
  where = ''.join(f', {name}={value:g}' for name, value in fixed.items())
  lines = [f'law {law}{where}, N = column {SIZE[law]}, {len(table.used)} runs']
  excluded = [run for run in table.runs if run.excluded]
  if excluded:
    named = ', '.join(f'{run.name} seed {run.seed} ({run.excluded})' for run in excluded[:5])
    more = f' and {len(excluded) - 5} more' if len(excluded) > 5 else ''
    lines.append(f'excluded: {named}{more}')
  if result.draws:
    lines.append(
      f'coefficient     value   10th to 90th percentile of {len(result.draws)} resampled fits'
    )
  for field in dataclasses.fields(result.law):
    value = f'{field.name:<8}{getattr(result.law, field.name):>13.5g}'
    if result.draws:
      low, high = result.interval(field.name)
      value += f'   {low:.5g} to {high:.5g}'
    lines.append(value)
  lines.append(f'RMSE {result.rmse:.4f} nats on all runs, largest error {result.max_error:.4f}')
  lines.append(
    f'RMSE {result.held_out_rmse:.4f} nats on {result.held_out.sum()} runs held out from a fit to the others'
  )
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.run(main)
