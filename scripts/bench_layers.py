"""What does a router cost? `scripts/python scripts/bench_layers.py [--routers A,B] [--out FILE] [--rounds N]`

Times forward + backward of whole mixture layers on this machine, from few experts to many at equal active work: the
rows (or slots) that experts work on stay the same. Prints medians, the time relative to the fewest experts, and which
part the router with its assignment takes by itself. Contestants take turns, so that a load from elsewhere meets all.
"""

import argparse
import functools
import json
import pathlib
import platform
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import Context, MoE

SEQUENCES, LENGTH, WIDTH, HIDDEN = 16, 64, 256, 256
EXPERTS = (8, 64, 512)
SOFT_EXPERTS = (1, 4, 16, 64)  # of one slot for each of the 64 tokens of a sequence
ROUTERS = {
  'top_k': {'k': 2},
  'switch': {},
  'gshard': {},
  'vmoe': {},
  'noisy_top_k': {'k': 2},
  'cosine': {'k': 2},
  'group_limited': {'k': 2},
  'modified_softmax': {'k': 2},
  'expert_choice': {'capacity_factor': 2.0},
  'sinkhorn': {},
  'sinkhorn_expert_choice': {'capacity_factor': 2.0},
  'base': {},
  'hash': {},
  'thor': {},
  'smile': {},
  'locmoe': {},
  'soft': {},
}


def layer_steps(name: str, options: dict, experts: int):
  """Compiled forward and backward passes of the whole layer and of its router alone, without arguments."""
  if name == 'soft':
    options = {'slots': LENGTH // experts}
  layer = MoE(WIDTH, HIDDEN, experts, {'name': name, **options}, rngs=nnx.Rngs(0))
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  x = jax.random.normal(jax.random.key(1), (SEQUENCES, LENGTH, WIDTH))
  ids = jax.random.randint(jax.random.key(2), x.shape[:2], 0, 256)
  context = Context(token_ids=ids, rng=jax.random.key(3), train=True)

  def whole(params, x):
    y, aux = nnx.merge(graph, params, rest)(x, context)
    return (y * y).mean() + sum(aux.losses.values())

  router_graph, router_params, router_rest = nnx.split(layer.router, nnx.Param, ...)

  def router_alone(
    params, x
  ):  # of its own parameters: gradients of experts would be zeros to fill in
    scores, plan = nnx.merge(router_graph, params, router_rest).route(x, context)
    floats = [leaf for leaf in jax.tree.leaves((scores, plan)) if leaf.dtype == x.dtype]
    whole_numbers = [leaf for leaf in jax.tree.leaves(plan) if leaf.dtype != x.dtype]
    # -inf marks experts that cannot be chosen; integers must not be optimised away
    total = sum(jnp.where(jnp.isfinite(leaf), leaf, 0).mean() for leaf in floats)
    return total + 1e-9 * sum(leaf.sum() for leaf in whole_numbers)

  steps = []
  for function, own in ((whole, params), (router_alone, router_params)):
    compiled = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(own, x).compile()
    steps.append(functools.partial(compiled, own, x))
  return steps


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


def contest(name: str, options: dict, rounds: int) -> list[dict]:
  """Races one router with few experts to many; a row each."""
  steps = {}
  for experts in SOFT_EXPERTS if name == 'soft' else EXPERTS:
    steps[experts, 'layer'], steps[experts, 'router'] = layer_steps(name, options, experts)
  seconds = race(steps, rounds)
  rows, first = [], None
  for experts in sorted({key[0] for key in steps}):
    layer, router = seconds[experts, 'layer'], seconds[experts, 'router']
    first = first or layer
    rows.append(
      {
        'router': name,
        'experts': experts,
        'milliseconds': 1e3 * layer,
        'times_first': layer / first,
        'router_part': router / layer,
      }
    )
    print(f'{name:>24} {experts:7} {1e3 * layer:9.1f} {layer / first:8.2f} {router / layer:12.2f}')
  return rows


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--routers', default=','.join(ROUTERS), help='names, with commas between')
  parser.add_argument('--out', type=pathlib.Path, help='write the table as JSON to this file')
  parser.add_argument('--rounds', type=int, default=7, help='timed turns of each contestant')
  options = parser.parse_args(arguments)
  print(f'T={SEQUENCES * LENGTH} D={WIDTH} F={HIDDEN}, forward + backward')
  print(f'{"router":>24} {"experts":>7} {"ms":>9} {"x first":>8} {"router part":>12}')
  rows = []
  for name in options.routers.split(','):
    if name not in ROUTERS:
      parser.error(f'--routers={name}: accepted are {", ".join(ROUTERS)}')
    rows += contest(name, ROUTERS[name], options.rounds)
  if options.out:
    machine = {'machine': platform.machine(), 'jax': jax.__version__}
    options.out.write_text(json.dumps({**machine, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
  main()
