"""What does routing cost? `scripts/python scripts/bench_routers.py [--routers A,B] [--peer] [--out FILE] [--rounds N]`

Three questions on this machine, forward + backward, answered by ratios within one run whose contestants take turns:

- the part of a layer's time that its router with the assignment takes, with 64 experts;
- the time of a layer with 8, 64 and 512 experts at equal active work, over that with 8;
- a training step (SGD) of PEER with 1,048,576 experts over that of a dense feed-forward layer of as many model FLOPs.

Times are CPU seconds of the process: pin it to one core (`taskset -c 0`), and they are wall time without other load.

Routers of many choices take 8 experts, the others one (or two). There are so many rows that the weights of 512 experts,
which a step reads twice and whose gradients it writes, do not outweigh the work on rows: 512 an expert, or 256 where a
row has a token to itself. A row of an earlier run in --out is replaced if its router runs again.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.allocator import keep_freed_memory
from moejax import Context, MoE
from moejax.moe.peer import Peer
from moejax.transformer.ffn import FFN
from scripts.conditions import conditions

LENGTH, WIDTH, HIDDEN = 1024, 256, 512
VOCABULARY = 4096  # more ids than experts, which some routers hash or mask by them
MANY, FEW = 262_144, 131_072
"""Rows of all experts; a router with k choices sees k times fewer tokens."""
EXPERTS = (8, 64, 512)
SLOW = 60.0
"""Seconds of one call past which a router is not asked with more experts."""
PEER = {'experts': 1024**2, 'heads': 8, 'k': 16, 'query_width': 128, 'width': 128, 'tokens': 8192}
ONE: dict = {}
EIGHT = {'k': 8}
ROUTERS = {
  'top_k': EIGHT,
  'switch': ONE,
  'gshard': ONE,
  'vmoe': EIGHT,
  'noisy_top_k': EIGHT,
  'cosine': EIGHT,
  'group_limited': {'k': 8, 'groups': 4, 'limit': 4},
  'modified_softmax': EIGHT,
  'expert_choice': {'capacity_factor': 8.0},
  'sinkhorn': EIGHT,
  'sinkhorn_expert_choice': {'capacity_factor': 8.0},
  'sparse_expert_choice': {'capacity_factor': 8.0},
  'base': {'group': 'sequence'},
  'hash': ONE,
  'mask_moe': {'k': 8, 'visible': 8, 'vocab_size': VOCABULARY},
  'thor': ONE,
  'smoe_dropout': {'k_min': 8, 'k_max': 8},
  'ewa': ONE,
  'top_p': {'p': 1.0, 'max_k': 8},
  'ada_moe': {'k': 16, 'nulls': 'experts'},
  'smile': ONE,
  'locmoe': ONE,
  'moec': ONE,
  'rmoe': {'k': 8, 'width': WIDTH // 4},  # 256 of 4096 in the released code
  'gating_residual': EIGHT,
  'pre_gated': EIGHT,
  'm3vit': {'k': 8, 'tasks': 2},
  'family': EIGHT,
  'speech_moe': {'k': 8, 'width': 16},
  'time_moe': EIGHT,
  'image': EIGHT,
  'spatial': EIGHT,
}
"""All that send rows to a few experts; `read_me` chooses apart from the layers, and `space_moe` by words."""


MOST = {'locmoe': WIDTH}
"""Experts that a router cannot have more of."""


def options_of(name: str, experts: int) -> dict:
  """Those of `ROUTERS`, 'experts' replaced by their number."""
  return {key: experts if value == 'experts' else value for key, value in ROUTERS[name].items()}


def tokens_of(name: str, layer: MoE) -> int:
  """As many as fill the rows: eighths where a router takes a number of choices here, which nulls may be among."""
  if {'k', 'k_max', 'max_k', 'capacity_factor'}.intersection(ROUTERS[name]):
    return MANY // 8
  return LENGTH * round(FEW / layer.rows_per_token(LENGTH) / LENGTH)


def inputs(tokens: int, width: int) -> tuple[jax.Array, Context]:
  """Tokens `[B, S, D]`, and all that a router may look at."""
  x = jax.random.normal(jax.random.key(1), (tokens // LENGTH, LENGTH, width))
  ids = jax.random.randint(jax.random.key(2), x.shape[:2], 0, VOCABULARY)
  first = ids[:, 0]
  positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), x.shape[:2])
  side = {'task': first % 2, 'time': first / VOCABULARY, 'domain': x[:, 0, :16]}
  context = Context(
    token_ids=ids,
    positions=positions,
    rng=jax.random.key(3),
    progress=jnp.float32(0.5),
    train=True,
    **side,
  )
  return x, context


def layer_steps(name: str, experts: int) -> dict:
  """Compiled forward and backward passes of the whole layer and of its router alone, without arguments."""
  router = {'name': name, **options_of(name, experts)}
  layer = MoE(WIDTH, HIDDEN, experts, router, rngs=nnx.Rngs(0))
  x, context = inputs(tokens_of(name, layer), WIDTH)
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  def whole(params, x):
    y, aux = nnx.merge(graph, params, rest)(x, context)
    return (y * y).mean() + sum(aux.losses.values())

  router_graph, router_params, router_rest = nnx.split(layer.router, nnx.Param, ...)

  def router_alone(params, x):
    scores, plan = nnx.merge(router_graph, params, router_rest).route(x, context)
    floats = [leaf for leaf in jax.tree.leaves((scores.probs, plan)) if leaf.dtype == x.dtype]
    whole_numbers = [leaf for leaf in jax.tree.leaves(plan) if leaf.dtype != x.dtype]
    total = sum(jnp.where(jnp.isfinite(leaf), leaf, 0).mean() for leaf in floats)
    return total + 1e-9 * sum(leaf.sum() for leaf in whole_numbers)  # not optimised away

  return {
    'layer': compiled(whole, params, x),
    'router': compiled(router_alone, router_params, x),
  }


def compiled(function, params, x):
  """The function with its gradients, compiled for these arguments and given them."""
  step = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).lower(params, x).compile()
  return functools.partial(step, params, x)


def seconds(run) -> float:
  """CPU seconds of one call, which other load of the machine does not change much."""
  start = time.process_time()
  jax.block_until_ready(run())
  return time.process_time() - start


def race(steps: dict, rounds: int) -> dict:
  """Median seconds of each step; the steps take turns, in a first one that does not count the heap grows."""
  times: dict = {name: [] for name in steps}
  for turn in range(rounds + 1):
    for name, run in steps.items():
      took = seconds(run)
      if turn:
        times[name].append(took)
  return {name: statistics.median(values) for name, values in times.items()}


def contest(name: str, rounds: int) -> dict:
  """One router with few experts to many."""
  steps, last = {}, 0.0
  for experts in EXPERTS:
    if last > SLOW or experts > MOST.get(name, experts):
      break
    made = layer_steps(name, experts)
    steps |= {
      (experts, part): run for part, run in made.items() if part == 'layer' or experts == 64
    }
    last = max(seconds(run) for run in made.values())  # warms up
  median = race(steps, rounds)
  layer = {experts: median[experts, 'layer'] for experts in EXPERTS if (experts, 'layer') in median}
  row = {
    'router': name,
    'options': ROUTERS[name],
    'milliseconds': {str(experts): 1e3 * value for experts, value in layer.items()},
    'times_8': {str(experts): value / layer[8] for experts, value in layer.items()},
    'router_part_of_64': median[64, 'router'] / layer[64] if 64 in layer else None,
  }
  print(line(row), flush=True)
  return row


def line(row: dict) -> str:
  """A row of the table on the terminal."""
  cells = [f'{row["milliseconds"].get(str(e), float("nan")):9.1f}' for e in EXPERTS]
  cells += [f'{row["times_8"].get(str(e), float("nan")):8.2f}' for e in EXPERTS[1:]]
  part = row['router_part_of_64']
  return f'{row["router"]:>24}' + ''.join(cells) + f'{float("nan") if part is None else part:12.3f}'


def peer_contest(rounds: int) -> dict:
  """Training steps of PEER and of a dense layer of as many model FLOPs."""
  sizes = {key: PEER[key] for key in ('heads', 'k', 'query_width')}
  width, tokens = PEER['width'], PEER['tokens']
  layer = Peer(width, PEER['experts'], **sizes, rngs=nnx.Rngs(0))
  parts = layer.flops_per_token(LENGTH)
  hidden = round(sum(parts.values()) / (2 * 2 * width))
  dense = FFN(width, hidden, activation='gelu', gated=False, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (tokens // LENGTH, LENGTH, width))

  def training(module, apply):
    graph, state = nnx.split(module)

    def step(state, x):
      gradient = jax.grad(lambda state: (apply(nnx.merge(graph, state), x) ** 2).mean())(state)
      return jax.tree.map(lambda p, g: p - 0.1 * g, state, gradient)

    run = jax.jit(step, donate_argnums=0).lower(state, x).compile()
    box = [state]

    def once():
      box[0] = run(box[0], x)
      return box[0]

    return once

  steps = {
    'peer': training(layer, lambda module, x: module(x)[0]),
    'dense': training(dense, lambda module, x: module(x)),
  }
  for run in steps.values():
    seconds(run)
  median = race(steps, rounds)
  found = {
    **PEER,
    'flops_per_token': sum(parts.values()),
    'dense_hidden': hidden,
    'milliseconds': {name: 1e3 * value for name, value in median.items()},
    'times_dense': median['peer'] / median['dense'],
  }
  print(
    f'PEER {found["times_dense"]:.2f} times the dense layer: {found["milliseconds"]}', flush=True
  )
  return found


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--routers', default=','.join(ROUTERS), help='names, with commas; "" for none'
  )
  parser.add_argument('--peer', action='store_true', help='PEER against a dense layer too')
  parser.add_argument('--out', type=pathlib.Path, help='write the tables as JSON to this file')
  parser.add_argument('--rounds', type=int, default=2, help='timed turns of each contestant')
  options = parser.parse_args(arguments)
  keep_freed_memory()  # as experiments.train
  names = [name for name in options.routers.split(',') if name]
  for name in names:
    if name not in ROUTERS:
      parser.error(f'--routers={name}: accepted are {", ".join(ROUTERS)}')
  found: dict = {}
  if options.out and options.out.exists():
    found = json.loads(options.out.read_text())
  rows = {row['router']: row for row in found.get('rows', [])}
  found |= {**conditions(), 'rounds': options.rounds}
  found |= {'many': MANY, 'few': FEW, 'length': LENGTH, 'width': WIDTH, 'hidden': HIDDEN}
  print(
    f'{MANY} or {FEW} rows, D={WIDTH} F={HIDDEN}: ms with 8, 64, 512 experts; over 8; part of the router'
  )
  for name in names:
    rows[name] = contest(name, options.rounds)
    found['rows'] = [rows[known] for known in ROUTERS if known in rows]
    write(options.out, found)
    jax.clear_caches()
  if options.peer:
    found['peer'] = peer_contest(options.rounds)
    write(options.out, found)


def write(out: pathlib.Path | None, found: dict) -> None:
  """What is known so far, if a file was asked for."""
  if out:
    out.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__':
  main()
