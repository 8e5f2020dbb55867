"""What a router that sees later tokens does to a causal language model: configs/sweeps/leak_cpu.py.

  python -m experiments.studies.leak DIR

DIR is the sweep's folder; writes experiments/results/leak_cpu. Each model predicts the same bytes twice: out of the
whole sequence, as in training and in the usual evaluation, and out of the prefix before the byte alone, as it would
have to when it writes. A causal model gives the same loss both times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import cli, workdir
from experiments.build import assemble
from experiments.checkpoint import Checkpoints
from experiments.claims import Claim, compare, write_result
from experiments.settings import Settings
from experiments.studies import figure, rows
from experiments.studies.rows import router_is
from moejax.transformer import Decoder

PREFIXES = (8, 16, 24, 32, 40, 48, 56, 64)
BATCHES = 8
COMMAND = rows.commands('leak')
NOTE = (
  'Decoders of width 64 with two blocks, both mixtures of eight experts, 400 steps of 32 sequences of 64 bytes. Losses '
  f'are of the bytes after {", ".join(map(str, PREFIXES[:-1]))} and {PREFIXES[-1]} bytes of {BATCHES * 32} validation '
  'sequences. "Among a sequence" is expert choice among the tokens of one sequence, "at a position" among the '
  'tokens that stand at the same place of different sequences.\n\n'
  'The claim that is not reproduced, that a leaking router has learnt nothing more than one that cannot leak, is '
  'one of equality up to noise: both models have the same size, and what remains between them is within two '
  'deviations. More layers and longer sequences give more future to read; of those here, the '
  'longest prefix is 64 bytes.'
)
ARMS = {
  'among a sequence': {'name': 'expert_choice', 'group': 'sequence', 'capacity_factor': 1.0},
  'at a position': {'name': 'expert_choice', 'group': 'position', 'capacity_factor': 1.0},
  'token choice': {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk'},
}


def losses_of(
  call: Callable[[jax.Array], jax.Array], tokens: jax.Array, targets: jax.Array
) -> tuple[float, float]:
  """Mean loss of the bytes after the prefixes: given the whole sequence, and given the prefix alone.

  Args:
    call: tokens `[B, S]` of any length -> logits `[B, S, V]`.
    tokens, targets: int `[B, S]`.
  """
  loss = optax.softmax_cross_entropy_with_integer_labels
  last = np.array(PREFIXES) - 1
  whole = loss(call(tokens)[:, last], targets[:, last]).mean()
  alone = [loss(call(tokens[:, : i + 1])[:, i], targets[:, i]).mean() for i in last]
  return float(whole), float(np.mean(jax.device_get(alone)))


def measure(folder: Path) -> tuple[float, float]:
  """Both losses of a finished run, over the first batches of its evaluation data."""
  settings = Settings.from_config(workdir.read_json(workdir.config_path(folder)))
  parts = assemble(settings)
  with Checkpoints(folder / 'checkpoints', read_only=True) as checkpoints:
    state, _ = checkpoints.restore(parts.program.abstract)
  model = parts.program.definition.model(state.params, state.routing)
  assert isinstance(model, Decoder)
  batches = [parts.eval_stream.batch(index) for index in range(BATCHES)]
  call = jax.jit(lambda tokens: model(tokens)[0])
  pairs = [
    losses_of(call, jnp.asarray(batch['tokens']), jnp.asarray(batch['targets']))
    for batch in batches
  ]
  whole, alone = np.mean(pairs, 0)
  return float(whole), float(alone)


def claims(measured: dict[str, list[tuple[float, float]]]) -> list[Claim]:
  """Claims of (loss given all, loss given the prefix) by arm and seed."""
  paper = 'Zhou et al. 2022, section 6'
  whole = {name: [pair[0] for pair in pairs] for name, pairs in measured.items()}
  alone = {name: [pair[1] for pair in pairs] for name, pairs in measured.items()}
  leaky, safe = 'among a sequence', 'at a position'
  return [
    compare(
      'a causal model with expert choice among a sequence is worse when it cannot see the future',
      paper,
      'not usable for generation',
      whole[leaky],
      alone[leaky],
    ),
    compare(
      'its loss in training flatters it: lower than that of expert choice at a position',
      'our demonstration',
      'none',
      whole[leaky],
      whole[safe],
    ),
    compare(
      'without the future it is no better than expert choice at a position',
      'our demonstration',
      'none',
      alone[safe],
      alone[leaky],
    ),
  ]


def main(argv: list[str]) -> int:
  (folder,) = cli.folders(argv, 'experiments.studies.leak')
  table = rows.read(folder)
  measured = {
    name: [
      measure(folder / row['key'])
      for row in sorted(filter(router_is(**router), table), key=lambda row: row['seed'])
    ]
    for name, router in ARMS.items()
  }
  out = rows.RESULTS / 'leak_cpu'
  out.mkdir(parents=True, exist_ok=True)
  bars = {}
  for name, pairs in measured.items():
    bars[f'{name}, whole sequence'] = [pair[0] for pair in pairs]
    bars[f'{name}, prefix alone'] = [pair[1] for pair in pairs]
  title = 'The same bytes, with the future at hand and without'
  figure.bars(out / 'plot.png', bars, 'loss, nats a byte', title)
  write_result(
    out,
    claims(measured),
    COMMAND,
    rows.machine(),
    rows.minutes(table),
    title='A router that sees the future, in a causal language model',
    note=NOTE,
    losses=bars,
  )
  print(out, file=sys.stderr)
  return 0


if __name__ == '__main__':
  cli.run(main)
