"""How fast are the experts here? `scripts/python scripts/bench_experts.py [--out FILE] [--rounds N]`

Times forward + backward of `expert_ffn` on this machine and prints medians, useful FLOP/s (18 R D F: 6 R D F
forward, 12 backward) and their part of the rate of a 2048^3 matmul. Contestants take turns, so that a load
from elsewhere meets all of them; ratios are of medians of the same rounds.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp

from experiments.allocator import keep_freed_memory
from pallas_kernels import expert_ffn
from scripts.conditions import conditions


class Shape(NamedTuple):
  """T tokens of width D, E experts of hidden width F, K choices a token."""

  tokens: int
  width: int
  hidden: int
  experts: int
  choices: int

  @property
  def flops(self) -> int:
    return 18 * self.tokens * self.choices * self.width * self.hidden


BIG = Shape(4096, 512, 1024, 16, 2)
SMALL = Shape(4096, 256, 256, 16, 2)
# Equal active work and equal weights in total: finer experts, more of them chosen.
FINE = tuple(Shape(4096, 512, 1024 // g, 16 * g, 2 * g) for g in (1, 2, 4, 8))
# Equal active work, experts of one size: the weights grow with E.
MANY = tuple(Shape(4096, 256, 256, experts, 2) for experts in (16, 32, 64, 128))


class Routing(NamedTuple):
  """What expert_ffn reads of an assignment."""

  token: jax.Array
  expert: jax.Array
  weight: jax.Array
  num_experts: int
  groups: int


def inputs(shape: Shape):
  """(x, expert, weight, w_gate, w_up, w_down, cotangent), float32; distinct random experts a token."""
  keys = iter(jax.random.split(jax.random.key(0), 8))
  t, d, f, e, k = shape
  normal = lambda *size: jax.random.normal(next(keys), size) * size[-2] ** -0.5
  scores = jax.random.uniform(next(keys), (t, e))
  expert = jnp.argsort(scores, axis=1)[:, :k].reshape(-1).astype(jnp.int32)
  weight = jax.random.uniform(next(keys), (t * k,))
  x, cotangent = normal(t, d), normal(t, d)
  return x, expert, weight, normal(e, d, f), normal(e, d, f), normal(e, f, d), cotangent


def ragged_dot_ffn(x, routing, w_gate, w_up, w_down):
  """The same layer on jax.lax.ragged_dot, differentiated by JAX."""
  order = jnp.argsort(routing.expert, stable=True)
  sizes = jnp.bincount(routing.expert, length=routing.num_experts).astype(jnp.int32)
  rows = x[routing.token[order]]
  dot = lambda a, w: jax.lax.ragged_dot(a, w, sizes)
  y = dot(jax.nn.silu(dot(rows, w_gate)) * dot(rows, w_up), w_down)
  y = y[jnp.argsort(order)] * routing.weight[:, None]
  return y.reshape(x.shape[0], -1, x.shape[1]).sum(axis=1)


IMPLEMENTATIONS = {
  'cpu': functools.partial(expert_ffn, activation='silu', implementation='cpu'),
  'blocks': functools.partial(expert_ffn, activation='silu', implementation='blocks'),
  'ragged_dot': ragged_dot_ffn,
}


def step(implementation: str, shape: Shape):
  """A compiled forward and backward pass, ready to be called without arguments."""

  def loss(trained, expert, cotangent):
    x, weight, *w = trained
    token = jnp.arange(expert.shape[0], dtype=jnp.int32) // shape.choices
    routing = Routing(token, expert, weight, shape.experts, shape.tokens)
    return jnp.vdot(IMPLEMENTATIONS[implementation](x, routing, *w), cotangent)

  x, expert, weight, *w, cotangent = inputs(shape)
  arguments = ((x, weight, *w), expert, cotangent)
  compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
  return functools.partial(compiled, *arguments)


def matmul_step(size: int = 2048):
  """The yardstick: a dense float32 matmul."""
  a = jnp.ones((size, size))
  return functools.partial(jax.jit(jnp.matmul).lower(a, a).compile(), a, a)


def race(steps: dict, rounds: int) -> dict[str, float]:
  """Median seconds of each step; the steps take turns, after one call each to warm up."""
  times = {name: [] for name in steps}
  for turn in range(rounds + 1):
    for name, run in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if turn:
        times[name].append(time.perf_counter() - start)
  return {name: statistics.median(values) for name, values in times.items()}


def contest(title: str, entries: list[tuple[str, Shape]], rounds: int) -> list[dict]:
  """Races the entries and the dense matmul, prints a table, returns its rows."""
  seconds = race(
    {'dense': matmul_step(), **{i: step(*entry) for i, entry in enumerate(entries)}}, rounds
  )
  dense = 2 * 2048**3 / seconds['dense']
  print(f'\n{title} (dense matmul: {dense / 1e9:.0f} GFLOP/s)')
  header = '{:>10} {:>5} {:>5} {:>5} {:>4} {:>3} {:>9} {:>8} {:>9}'
  print(header.format('body', *'TDFEK', 'ms', 'x first', 'of dense'))
  rows = []
  for i, (name, shape) in enumerate(entries):
    part = shape.flops / seconds[i] / dense
    rows.append(
      {
        'implementation': name,
        **shape._asdict(),
        'milliseconds': 1e3 * seconds[i],
        'times_first': seconds[i] / seconds[0],
        'part_of_dense_rate': part,
        'dense_gflops': dense / 1e9,
      }
    )
    sizes = '{:>5} {:>5} {:>5} {:>4} {:>3}'.format(*shape)
    print(f'{name:>10} {sizes} {1e3 * seconds[i]:9.1f} {seconds[i] / seconds[0]:8.2f} {part:9.2f}')
  return rows


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', type=pathlib.Path, help='write the tables as JSON to this file')
  parser.add_argument('--rounds', type=int, default=7, help='timed turns of each contestant')
  options = parser.parse_args(arguments)
  keep_freed_memory()  # as experiments.train
  three = ('cpu', 'blocks', 'ragged_dot')
  tables = {
    'bodies': contest('Bodies', [(name, BIG) for name in three], options.rounds),
    'small': contest('Bodies, small experts', [(name, SMALL) for name in three], options.rounds),
    'fine': contest('Finer experts', [('cpu', shape) for shape in FINE], options.rounds),
    'many': contest('More experts of one size', [('cpu', shape) for shape in MANY], options.rounds),
  }
  if options.out:
    options.out.write_text(json.dumps({**conditions(), 'tables': tables}, indent=1) + '\n')


if __name__ == '__main__':
  main()
