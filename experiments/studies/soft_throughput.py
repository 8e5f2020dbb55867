"""Is the time of a Soft MoE layer flat in the number of experts at fixed slots? (Puigcerver et al. 2023, figure 6)

  python -m experiments.studies.soft_throughput

times a layer here and writes experiments/results/soft_throughput. Forward pass, both passes, and the optimizer's update
are timed apart: the update works on weights, of which more experts have more whatever their slots.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments import cli
from experiments.claims import Claim, verdict, write_result
from experiments.studies import figure, rows
from moejax import MoE

SLOTS, WIDTH, HIDDEN, EXPERTS, BATCHES, ROUNDS = 64, 256, 256, (1, 8, 64), (16, 128, 512), 5
ALLOWED = 1.15
Times = dict[str, dict[int, list[float]]]  # what -> experts -> seconds of every round

PAPER = 'Soft MoE, Puigcerver et al. 2023, figure 6'
PUBLISHED = '379, 378, 375, 371, 367, 365 images/s with 8, 16, ..., 256 experts at 256 slots'
NOTE = (
  f'One layer of width {WIDTH}, gated experts of hidden width {HIDDEN}, {SLOTS} tokens and {SLOTS} slots an image, '
  f'float32. Contestants take turns, {ROUNDS} rounds after one that does not count; a ratio is of the same round, and '
  f'rounds stand for seeds. "Measured" is {ALLOWED} less the ratio: flat is to mean that 64 experts take less than '
  f'{ALLOWED} times as long as one.\n\n'
  'The products of experts have the same size in all, and their rows are shared among more of them: with 16 images an '
  'expert of one slot has 16 rows for weights that are read, and gradients that are written, once. So a CPU waits for '
  'memory, 64 times as much of it as with one expert, and time gets flatter the more rows each expert has. What '
  'remains with many images includes the copies that put slots in the order of their experts and back, of which '
  'one expert needs none. The paper trains on batches of 4,096 images. The update is never flat by itself: it '
  'reads and writes all weights and moments, whatever works on them. An accelerator with a batch of the '
  'paper, on which weights are read once for thousands of rows, is the set-up that should show flat '
  'times.\n\nMilliseconds, medians of the rounds:\n\n'
)


def contestants(batch: int, experts: int) -> dict[str, Callable[[], Any]]:
  """Compiled functions without arguments: forward pass, both passes, and AdamW's update of the layer's weights."""
  layer = MoE(WIDTH, HIDDEN, experts, {'name': 'soft', 'slots': SLOTS // experts}, rngs=nnx.Rngs(0))
  graph, params = nnx.split(layer)
  x = jax.random.normal(jax.random.key(1), (batch, SLOTS, WIDTH))
  optimizer = optax.adamw(1e-3)
  state = optimizer.init(params)

  def forward(params, x):
    return nnx.merge(graph, params)(x)[0]

  def both(params, x):
    return jax.grad(lambda params, x: jnp.square(forward(params, x)).mean(), argnums=(0, 1))(
      params, x
    )

  def compiled(function: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    program = jax.jit(function).lower(*given).compile()
    return lambda: program(*given)

  return {
    'forward': compiled(forward, params, x),
    'both passes': compiled(both, params, x),
    'update': compiled(optimizer.update, params, state, params),
  }


def measure(batch: int, experts: tuple[int, ...] = EXPERTS, rounds: int = ROUNDS) -> Times:
  """Seconds of every round of every contestant; they take turns."""
  runs = {one: contestants(batch, one) for one in experts}
  times: Times = {what: {one: [] for one in experts} for what in runs[experts[0]]}
  for turn in range(rounds + 1):
    for what, of_experts in times.items():
      for one in experts:
        start = time.perf_counter()
        jax.block_until_ready(runs[one][what]())
        if turn:
          of_experts[one].append(time.perf_counter() - start)
  return times


def claims(times: Mapping[int, Times]) -> list[Claim]:
  """Times by batch -> claims."""

  def flat(batch: int, what: str, source: str, published: str) -> Claim:
    of_experts = times[batch][what]
    few, many = min(of_experts), max(of_experts)
    ratios = [a / b for a, b in zip(of_experts[many], of_experts[few], strict=True)]
    room, sd = ALLOWED - float(np.mean(ratios)), float(np.std(ratios, ddof=1))
    claim = (
      f'{many} experts take less than {ALLOWED} times as long as {few}, {batch} images: {what}'
    )
    return Claim(claim, source, published, room, sd, len(ratios), verdict(room, sd, len(ratios)))

  passes = [
    flat(batch, what, PAPER, PUBLISHED)
    for batch in sorted(times)
    for what in ('forward', 'both passes')
  ]
  return [*passes, flat(max(times), 'update', 'our demonstration', 'none')]


def page(times: Mapping[int, Times]) -> str:
  """The medians as a table."""
  experts = list(next(iter(next(iter(times.values())).values())))
  head = ['images', 'what', *(f'{one} experts' for one in experts), 'most / fewest']
  lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
  for batch, parts in times.items():
    for what, of_experts in parts.items():
      found = [float(np.median(of_experts[one])) for one in experts]
      cells = [f'{1e3 * one:.1f}' for one in found]
      lines.append(f'| {batch} | {what} | {" | ".join(cells)} | {found[-1] / found[0]:.2f} |')
  return '\n'.join(lines)


def main(argv: list[str]) -> int:
  cli.folders(argv, 'experiments.studies.soft_throughput', ())
  start = time.monotonic()
  times = {batch: measure(batch) for batch in BATCHES}
  out = rows.RESULTS / 'soft_throughput'
  out.mkdir(parents=True, exist_ok=True)
  few, many = min(EXPERTS), max(EXPERTS)
  ratios = {
    f'{what}, {batch} images': [
      a / b for a, b in zip(of_experts[many], of_experts[few], strict=True)
    ]
    for batch, parts in times.items()
    for what, of_experts in parts.items()
    if what != 'update'
  }
  figure.bars(
    out / 'plot.png',
    ratios,
    f'time of {many} experts over that of {few}',
    f'Soft MoE at {SLOTS} slots an image, mean and s.d. of {ROUNDS} rounds',
  )
  write_result(
    out,
    claims(times),
    'scripts/python -m experiments.studies.soft_throughput',
    rows.machine(),
    (time.monotonic() - start) / 60,
    title='Time of a Soft MoE layer at fixed slots',
    note=NOTE + page(times),
    seconds={str(batch): parts for batch, parts in times.items()},
  )
  print(out, file=sys.stderr)
  return 0


if __name__ == '__main__':
  cli.run(main)
