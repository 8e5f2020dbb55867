"""The pages of claims as Markdown, from what `experiments.claims` read: pure functions of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from experiments.claims import Claim

VERDICTS = ('reproduced', 'not reproduced', 'opposite')
_MEANING = (
  'Measured is a mean ± the sample standard deviation over seeds; a comparison is positive if it goes the way of '
  'the claim, and counts as reproduced, or as opposite, beyond two standard deviations of at least three seeds.'
)


def folder_page(name: str, values: Mapping[str, Any], claims: Sequence[Claim]) -> str:
  """The README.md of one folder with claims.

  Args:
    name: of the folder; the title, where `values` have none.
    values: what result.json holds: command, machine, minutes, and title and note if it has them.
    claims: those of `values`.
  """
  rows = [
    (claim.claim, claim.source, claim.published, _measured(claim), claim.seeds, claim.verdict)
    for claim in claims
  ]
  parts = [
    f'# {values.get("title", name)}',
    values.get('note', ''),
    _table(('claim', 'source', 'published', 'measured', 'seeds', 'verdict'), rows),
    f'{_MEANING} Generated from `result.json`, which has the numbers of every run.',
    f'```sh\n{values["command"].strip()}\n```',
    f'{values["minutes"]:.3g} minutes in all on {values["machine"].strip().rstrip(".")}.',
    '![plot](plot.png)',
  ]
  return '\n\n'.join(part.strip() for part in parts if part.strip()) + '\n'


def overview(
  claimed: Mapping[str, Sequence[Claim]], measurements: Sequence[tuple[str, str, str]]
) -> str:
  """The README.md of all results.

  Args:
    claimed: folder -> its claims.
    measurements: folder, title and first sentence of those without claims.
  """
  verdicts = [claim.verdict for claims in claimed.values() for claim in claims]
  counts = ', '.join(f'{verdicts.count(one)} {one}' for one in VERDICTS)
  parts = ['# Results', f'{len(verdicts)} claims of papers: {counts}.']
  if claimed:
    rows = [
      (_link(name), one.claim, one.published, _measured(one), one.seeds, one.verdict)
      for name, claims in claimed.items()
      for one in claims
    ]
    parts.append(_table(('folder', 'claim', 'published', 'measured', 'seeds', 'verdict'), rows))
    parts.append(_MEANING)
  parts.append('`scripts/python -m experiments.claims` writes this page.')
  if measurements:
    lines = [(_link(name, title), text) for name, title, text in measurements]
    parts += ['## Measurements', _table(('folder', 'what'), lines)]
  return '\n\n'.join(parts) + '\n'


def _link(folder: str, title: str = '') -> str:
  return f'[{title or folder}]({folder}/README.md)'


def _measured(claim: Claim) -> str:
  """'0.0123 ± 0.0031': two digits of the deviation, and the mean as far."""
  if claim.sd == 0:
    return f'{claim.measured:.4g}'
  digits = 1 - math.floor(math.log10(claim.sd))
  mean, sd = (f'{round(value, digits):.{max(0, digits)}f}' for value in (claim.measured, claim.sd))
  return f'{mean} ± {sd}'


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  cells = [
    [' '.join(str(cell).split()).replace('|', '\\|') for cell in row] for row in [head, *rows]
  ]
  lines = [f'| {" | ".join(row)} |' for row in cells]
  return '\n'.join([lines[0], '|---' * len(head) + '|', *lines[1:]])
