"""The best model for a budget, by a published scaling law or by one fitted to runs.

  python -m experiments.optimal --law fine_grained --flops 1e21
  python -m experiments.optimal --law joint --flops 1e22 --memory 80GB --inference_tokens 1e12 --experts 1,2,4,8
  python -m experiments.optimal --fit DIR/fit.json --flops 1e21

Sizes are counted as in the paper of the law: fine_grained leaves embedding and head out, joint has them in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli
from experiments.arguments import Arguments, counts, memory, number
from experiments.errors import BadInput
from experiments.workdir import read_json
from moejax.scaling import (
  CHINCHILLA,
  FINE_GRAINED,
  FORMS,
  JOINT,
  Budget,
  Choice,
  Family,
  Law,
  ranked,
)
from moejax.scaling.accounting import dense, fine_grained, fine_grained_by_active, joint

GRANULARITIES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
EXPERTS = (1, 2, 4, 8, 16, 32)
SOURCES = {
  'chinchilla': 'constants of the replication by Besiroglu et al. 2024',
  'fine_grained': 'Krajewski et al. 2024, tables 1 and 8; active and total without embedding',
  'joint': 'Ludziejewski et al. 2025, table 3; active and total with embedding and head',
}

_FIT_KEYS = ('law', 'size', 'fixed', 'coefficients', 'draws', 'rows', 'runs')


@dataclasses.dataclass(frozen=True)
class Question:
  """A law to be asked: families of models under it, where it comes from, and resampled fits of the same families."""

  families: list[Family]
  source: str
  draws: list[list[Family]] = dataclasses.field(default_factory=list)


def main(argv: list[str]) -> int:
  options = _arguments().parse_args(argv[1:])
  budget = Budget(
    options.flops, options.memory, options.inference_tokens or 0, int(options.cache_tokens)
  )
  if options.fit:
    question = fitted(options.fit, options.law, options.experts, options.granularity)
  else:
    question = published(options.law or 'fine_grained', options.experts, options.granularity)
  print(answer(question, budget))
  return 0


def _arguments() -> Arguments:
  parser = Arguments('experiments.optimal', __doc__ or '')
  add = parser.add_argument
  add('--flops', type=number, required=True, help='of training, and of inference if any')
  add('--law', choices=sorted(FORMS), help='a published law; without it fine_grained')
  add('--fit', type=Path, help='fit.json of experiments.fit, in place of a published law')
  add('--memory', type=memory, help='limit of weights and cache in bfloat16, such as 80GB')
  add('--cache_tokens', type=number, default=16384, help='context in memory, default 16384 tokens')
  add('--inference_tokens', type=number, help='tokens to be served, paid from --flops')
  add('--experts', type=counts, help='expansion rates to compare, such as 1,2,4')
  add('--granularity', type=counts, help='granularities to compare, such as 1,2,4')
  return parser


def published(
  law: str, experts: tuple[int, ...] | None, granularity: tuple[int, ...] | None
) -> Question:
  """A law with the coefficients of its paper.

  Raises:
    BadInput: a law without published coefficients for this, or experts that it was not fitted to.
  """
  if law not in SOURCES:
    why = {'clark': 'has no training tokens', 'inference_optimal': 'has no published coefficients'}
    raise BadInput(f'--law={law} {why[law]}: accepted are {", ".join(SOURCES)}, or --fit')
  if law == 'chinchilla':
    _refuse(law, experts=experts, granularity=granularity)
    return Question([_family(CHINCHILLA['besiroglu'], dense, 1, 1, ())], SOURCES[law])
  if law == 'joint':
    _refuse(law, granularity=granularity)
    families = [_family(JOINT, joint, rate, 1, ('E',)) for rate in experts or EXPERTS]
    return Question(families, SOURCES[law])
  families = []
  for rate in experts or (1, 64):
    if f'E={rate}' not in FINE_GRAINED:
      raise BadInput(f'--experts={rate} with law fine_grained: accepted are 1, 16 and 64, or --fit')
    grains = (1,) if rate == 1 else granularity or GRANULARITIES
    coefficients = FINE_GRAINED[f'E={rate}']
    families += [_family(coefficients, fine_grained, rate, grain, ('G',)) for grain in grains]
  return Question(families, SOURCES[law])


def fitted(
  file: Path,
  law: str | None,
  experts: tuple[int, ...] | None,
  granularity: tuple[int, ...] | None,
) -> Question:
  """A law with the coefficients of fit.json, for models as of Krajewski et al. 2024: N as the runs have it.

  Raises:
    BadInput: the file is no fit, or of another law, or of a law that cannot be asked this.
  """
  record = read_json(file)
  missing = [key for key in _FIT_KEYS if key not in record]
  if missing:
    raise BadInput(f'--fit={file} is not a fit.json of experiments.fit: no {", ".join(missing)}')
  name = str(record['law'])
  if name not in FORMS:
    raise BadInput(f'--fit={file} is of law {name!r}: accepted are {", ".join(sorted(FORMS))}')
  form = FORMS[name]
  try:
    vectors = [[record['coefficients'][key]['value'] for key in form.names], *record['draws']]
    laws = [form.law(*vector) for vector in vectors]
    flops = [row['flops'] for row in record['rows'] if not row['excluded']]
  except (KeyError, TypeError) as error:
    raise BadInput(f'--fit={file} is not a fit.json of experiments.fit: {error!r}') from error
  if law not in (None, name):
    raise BadInput(f'--law={law} with --fit={file}, which holds a fit of law {name}')
  if 'D' not in form.columns:
    raise BadInput(f'--fit={file} is of law {name}, which has no training tokens to choose')
  _refuse(
    name,
    **{
      flag: value
      for flag, value, column in (('experts', experts, 'E'), ('granularity', granularity, 'G'))
      if column not in form.columns
    },
  )
  families = [fitted_families(record, one, experts, granularity) for one in laws]
  source = f'{file}: {record["runs"]} runs of {min(flops):.2g} to {max(flops):.2g} FLOPs'
  return Question(families[0], source, families[1:])


def fitted_families(
  record: dict[str, Any],
  law: Law,
  experts: tuple[int, ...] | None = None,
  granularity: tuple[int, ...] | None = None,
) -> list[Family]:
  """Models as of Krajewski et al. 2024 under a law of a fit.json, at each E and G that the law knows."""
  columns, fixed = FORMS[record['law']].columns, record['fixed']
  count = fine_grained if record['size'] == 'N' else fine_grained_by_active
  rates = experts or EXPERTS if 'E' in columns else (fixed['E'],)
  grains = granularity or GRANULARITIES if 'G' in columns else (fixed['G'],)
  return [_family(law, count, rate, grain, columns) for rate in rates for grain in grains]


def _refuse(law: str, **given: tuple[int, ...] | None) -> None:
  """BadInput for a flag that this law has no use for."""
  for flag, values in given.items():
    if values:
      text = ','.join(map(str, values))
      raise BadInput(f'--{flag}={text} with law {law}, which does not know it: leave it out')


def _family(
  law: Law, count: Callable[..., Any], E: float, G: float, known: tuple[str, ...]
) -> Family:
  extra = {name: value for name, value in (('E', E), ('G', G)) if name in known}
  return Family(
    E,
    G,
    count=lambda d: count(d, E, G),
    loss=lambda N, D: law(N=N, D=D, **extra),  # type: ignore[call-arg]
  )


def answer(question: Question, budget: Budget) -> str:
  """The choices, best first, as lines of text.

  Raises:
    BadInput: no model fits the budget.
  """
  try:
    choices = ranked(question.families, budget)
  except ValueError as error:
    raise BadInput(str(error)) from error
  spent = f'{budget.flops:.4g} FLOPs'
  if budget.inference_tokens:
    spent += f', of which {amount(budget.inference_tokens)} tokens are served'
  if budget.memory:
    spent += f', {size(budget.memory)} with {budget.cache_tokens:,} tokens of cache'
  lines = [f'law: {question.source}', f'budget: {spent}', '']
  lines.append('     E     G   active    total   tokens    width   memory    loss  margin')
  lines += [_line(choice) for choice in choices[:10]]
  if question.draws:
    lines += ['', _spread(question, budget)]
  return '\n'.join(lines)


def _line(choice: Choice) -> str:
  sizes = (choice.active, choice.total, choice.tokens)
  active, total, tokens = (amount(value) for value in sizes)
  return (
    f'{choice.E:>6g}{choice.G:>6g}{active:>9}{total:>9}{tokens:>9}{choice.width:>9.0f}'
    f'{size(choice.memory):>9}{choice.loss:>8.4f}{choice.margin:>+8.4f}'
  )


def _spread(question: Question, budget: Budget) -> str:
  """The 10th to 90th percentile of the best choice over the resampled fits, as in Krajewski et al. 2024, table 6."""
  best = [ranked(families, budget)[0] for families in question.draws]

  def spread(name: str, text: Callable[[float], str]) -> str:
    low, high = np.percentile(
      [getattr(choice, name) for choice in best], (10, 90), method='nearest'
    )
    return f'{name} {text(float(low))} to {text(float(high))}'

  parts = [spread('E', '{:g}'.format), spread('G', '{:g}'.format)]
  parts += [spread(name, amount) for name in ('active', 'tokens')]
  return f'10th to 90th percentile of {len(best)} resampled fits: {", ".join(parts)}'


def amount(value: float) -> str:
  """Three digits and a letter: 1.00B, 28.2B, 2.96T."""
  for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if value >= size * 0.9995:
      digits = 2 - int(np.floor(np.log10(value / size * 1.0005))) if value < 999.5 * size else 0
      return f'{value / size:.{max(0, digits)}f}{letter}'
  return f'{value:.0f}'


def size(value: float) -> str:
  """Bytes with three digits, as in 91.3 GB."""
  return f'{amount(value).replace("B", "G")}B'


if __name__ == '__main__':
  cli.run(main)
