"""What configs/sweeps/expert_choice_cpu.py says of the claims of expert choice routing, Zhou et al. 2022.

  python -m experiments.studies.expert_choice DIR

DIR is the sweep's folder; writes experiments/results/expert_choice_cpu.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from experiments import cli, workdir
from experiments.build import assemble
from experiments.checkpoint import Checkpoints
from experiments.claims import Claim, compare, write_result
from experiments.log import read_lines
from experiments.place import place_batch
from experiments.settings import Settings
from experiments.studies import figure, rows
from experiments.studies.multiplicity import multiplicity
from experiments.studies.rows import Row, by_seed, mean_sd, router_is
from moejax.transformer import Decoder

PAPER = 'Zhou et al. 2022'
COMMAND = rows.commands('expert_choice')
NOTE = (
  'A masked language model of width 96 with two blocks, the second a mixture of 16 experts, on bytes: 400 steps of 16 '
  'sequences of 128, loss in nats a masked byte on the same validation text. Token choice has capacity factor 1.25 '
  'and a balance loss of 0.01, as the paper has. Steps to a loss are read off the evaluation every 25 steps, with '
  'straight lines between. Seeds differ more than routers do after so few steps: the claims of loss are '
  'open here, not refuted. The loss to reach is the higher one of the last losses of both, with the same '
  'seed.\n\nWhat should show them: the smallest models for which the paper compares routers have 100 million active '
  'parameters and 32 experts in six of twelve layers '
  '(configs/expert_choice_glam.py:0.1b_32e). With this one the deviation between seeds has to fall below half of a '
  'difference, so longer training comes before more seeds: a verdict is of the deviation of a single seed, which more '
  'seeds only measure better.'
)


def arms() -> dict[str, Callable[[Row], bool]]:
  """Name -> which rows."""
  choice = {'name': 'expert_choice', 'group': 'batch'}
  return {
    'top-1': router_is(name='top_k', k=1, capacity_factor=1.25),
    'top-2': router_is(name='top_k', k=2, capacity_factor=1.25),
    'hash': router_is(name='hash'),
    'expert choice 0.5': router_is(**choice, capacity_factor=0.5),
    'expert choice 1': router_is(**choice, capacity_factor=1.0),
    'expert choice 2': router_is(**choice, capacity_factor=2.0),
    **{
      f'expert choice 2, capped at {cap}': router_is(**choice, capacity_factor=2.0, cap=cap)
      for cap in (2, 3)
    },
  }


Curve = Sequence[tuple[float, float]]


def steps_to(curve: Curve, loss: float) -> float:
  """Where the curve of (steps, loss) first is at `loss`, with straight lines between its points; nan if nowhere."""
  for (step, high), (after, low) in itertools.pairwise(curve):
    if low <= loss:
      return after if high == low else step + (after - step) * max(0.0, high - loss) / (high - low)
  return float('nan')


def relative_steps(ours: Curve, theirs: Curve) -> float:
  """Steps that the first run needs for a loss as a multiple of those that the second needs.

  The loss is the higher one of both last losses, which both reach.
  """
  loss = max(ours[-1][1], theirs[-1][1])
  return steps_to(ours, loss) / steps_to(theirs, loss)


def curve_of(folder: Path, row: Row) -> list[tuple[float, float]]:
  """(steps done, evaluation loss) of a run."""
  lines = read_lines(folder / row['key'] / 'metrics.jsonl')
  return [(line['step'] + 1, line['eval_loss']) for line in lines if 'eval_loss' in line]


def claims(
  loss: Mapping[str, Sequence[float]], ratio: Sequence[float], shares: np.ndarray
) -> list[Claim]:
  """Claims of final losses by arm, of steps relative to top-2, and of shares `[seeds, multiplicity]`."""

  def lower(claim: str, place: str, published: str, good: str, bad: str) -> Claim:
    return compare(claim, f'{PAPER}, {place}', published, loss[good], loss[bad])

  half, one, two = (f'expert choice {c}' for c in ('0.5', '1', '2'))
  glue = 'table 4 (accuracy on 11 tasks)'
  return [
    compare(
      'expert choice (2 experts a token) needs less than half the steps of top-2 for the same loss',
      f'{PAPER}, figure 2',
      'less than half the steps',
      ratio,
      [0.5] * len(ratio),
    ),
    compare(
      'expert choice (2 experts a token) needs fewer steps than top-2 for the same loss',
      f'{PAPER}, figure 2',
      'less than half the steps',
      ratio,
      [1.0] * len(ratio),
    ),
    lower(
      'expert choice of 1 expert a token has a lower loss than top-1',
      'figure 4b',
      'lower perplexity',
      one,
      'top-1',
    ),
    lower(
      'expert choice of half an expert a token has a lower loss than top-1',
      'figure 4b',
      'lower perplexity',
      half,
      'top-1',
    ),
    lower(
      'a larger capacity factor lowers the loss: 2 against 1',
      'figure 4b',
      'falls with the factor',
      two,
      one,
    ),
    lower(
      'a larger capacity factor lowers the loss: 1 against 0.5',
      'figure 4b',
      'falls with the factor',
      one,
      half,
    ),
    lower(
      'expert choice has a lower loss than a hash layer', glue, '84.0 against 81.3', two, 'hash'
    ),
    lower(
      'a cap of 2 experts a token costs loss',
      glue,
      '84.0 without a cap, 83.2 capped at 2',
      two,
      f'{two}, capped at 2',
    ),
    lower(
      'a cap of 3 experts a token costs less than a cap of 2',
      glue,
      '84.0 capped at 3, 83.2 capped at 2',
      f'{two}, capped at 3',
      f'{two}, capped at 2',
    ),
    compare(
      'more tokens have one or two experts than any other number',
      f'{PAPER}, section 4.5',
      'most have one or two; 23 % three or four, about 3 % more',
      shares[:, 1] + shares[:, 2],
      1 - shares[:, 1] - shares[:, 2],
      higher_is_better=True,
    ),
  ]


def main(argv: list[str]) -> int:
  (folder,) = cli.folders(argv, 'experiments.studies.expert_choice')
  table = rows.read(folder)
  loss = {name: by_seed(table, 'eval_loss', where) for name, where in arms().items()}
  chosen = {
    name: sorted(filter(where, table), key=lambda row: row['seed'])
    for name, where in arms().items()
  }
  curves = {name: [curve_of(folder, row) for row in group] for name, group in chosen.items()}
  ratio = [
    relative_steps(ours, theirs)
    for ours, theirs in zip(curves['expert choice 2'], curves['top-2'], strict=True)
  ]
  shares = np.stack([experts_of_tokens(folder / row['key']) for row in chosen['expert choice 2']])
  out = rows.RESULTS / 'expert_choice_cpu'
  out.mkdir(parents=True, exist_ok=True)
  draw(out / 'plot.png', curves, shares)
  write_result(
    out,
    claims(loss, ratio, shares),
    COMMAND,
    rows.machine(),
    rows.minutes(table),
    title='Expert choice against token choice and hashing',
    note=NOTE,
    loss=loss,
    steps_relative_to_top_2=ratio,
    experts_a_token={str(k): mean_sd(shares[:, k].tolist()) for k in range(shares.shape[1])},
  )
  print(out, file=sys.stderr)
  return 0


def experts_of_tokens(folder: Path) -> np.ndarray:
  """Shares of tokens with 0, 1, 2, ... experts in the first batch of the evaluation data of a run."""
  settings = Settings.from_config(workdir.read_json(workdir.config_path(folder)))
  parts = assemble(settings)
  with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
    state, _ = checkpoints.restore(parts.program.abstract)
  batch = place_batch(parts.program.mesh, parts.eval_stream.batch(0))
  model = parts.program.definition.model(state.params, state.routing)
  assert isinstance(model, Decoder)  # an encoder is one
  return multiplicity(model, jax.device_get(batch), settings.model.moe.num_experts)


def draw(file: Path, curves: Mapping[str, list], shares: np.ndarray) -> None:
  """Loss over steps by arm, and the experts a token has."""
  plt = figure.pyplot()
  drawing, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.8), layout='constrained', width_ratios=(2, 1)
  )
  for name, seeds in curves.items():
    steps = [step for step, _ in seeds[0]]
    mean = np.mean([[loss for _, loss in curve] for curve in seeds], 0)
    style = '-' if name.startswith('expert') else '--'
    left.plot(steps, mean, style, label=f'{name}: {mean[-1]:.3f}', linewidth=1.4)
  left.set_xlabel('steps')
  left.set_ylabel('evaluation loss, nats a masked byte')
  left.legend(title='last loss, mean of three seeds', fontsize=8)
  right.bar(
    range(shares.shape[1]), 100 * shares.mean(0), yerr=100 * shares.std(0, ddof=1), color='#1f5fa8'
  )
  right.set_xlabel('experts a token has, capacity factor 2')
  right.set_ylabel('% of the tokens')
  drawing.savefig(file)
  plt.close(drawing)


if __name__ == '__main__':
  cli.run(main)
