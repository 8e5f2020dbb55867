"""How fast are the kernels here? `scripts/python scripts/bench_kernels.py [--shapes A B C] [--only pack] [--check]`

Times every body of every operation on this machine's first device against a dense matmul of the same FLOPs (the
ceiling), `jax.lax.ragged_dot`, and what else is installed: tokamax, and with torch on CUDA its `_grouped_mm` and, with
Triton, a layer in the manner of ScatterMoE (bench_triton.py). Random data (zeros are faster); contestants take turns;
medians; backward is (forward + backward) - forward. Prints TFLOP/s by SonicMoE's convention (6 R D F forward and
12 R D F backward for a gated layer, arXiv 2512.14080), the fraction of the ceiling and the bytes of arguments and
results. What a body cannot do is said, and is no failure. The last line says which body is the fastest by shape, and so
what a config's `model.moe.implementation` should be on such a machine.

`--check` first runs the correctness cases of each body here. On a CPU use `--shapes small` (seconds) or `cpu`.
"""

import argparse
import functools
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments.allocator import keep_freed_memory
from pallas_kernels import (
  Quantised,
  Unsupported,
  expert_ffn,
  grouped_matmul,
  packed,
  quantise,
  quantised_matmul,
  registry,
  top_k,
)
from pallas_kernels.expert_ffn import NAMES as FFN_NAMES
from pallas_kernels.grouped_matmul import NAMES as MATMUL_NAMES
from pallas_kernels.quantised_matmul import NAMES as QUANTISED_NAMES
from pallas_kernels.routing import NAMES as ROUTING_NAMES
from scripts.bench_advice import advice
from scripts.conditions import conditions

REFUSALS = (Unsupported, NotImplementedError, ValueError, jax.errors.JaxRuntimeError)


class Shape(NamedTuple):
  """T tokens of width D, E experts of hidden width F, K choices; skewed: half the tokens choose expert 0."""

  name: str
  tokens: int
  width: int
  hidden: int
  experts: int
  choices: int
  skewed: bool = False


NAMED = (
  Shape('A', 32768, 2048, 1024, 64, 8),
  Shape('B', 24576, 1536, 256, 128, 8),
  Shape('C', 32768, 4096, 14336, 8, 2),
  Shape('decode', 256, 2048, 1024, 64, 8),
  Shape('cpu', 4096, 512, 1024, 16, 2),
  Shape('small', 512, 128, 256, 8, 2),
)
SKEWED = tuple(s._replace(name=f'{s.name}-skewed', skewed=True) for s in NAMED)
# Rows among few and many experts: where a CPU counts and where it sorts (routing/cpu.py).
PACKED = tuple(Shape(f'pack-{e}', 4096, 1, 1, e, 2) for e in (16, 64, 128, 256, 512))
SHAPES = {s.name: s for s in (*NAMED, *SKEWED, *PACKED)}


class Routing(NamedTuple):
  """What expert_ffn reads of an assignment."""

  token: jax.Array
  expert: jax.Array
  weight: jax.Array
  num_experts: int
  groups: int


def choose_experts(shape: Shape) -> np.ndarray:
  """int32 `[T * K]`, distinct experts of each token."""
  rng = np.random.default_rng(0)
  scores = rng.random((shape.tokens, shape.experts))
  if shape.skewed:
    scores[: shape.tokens // 2, 0] = -1  # the smallest come first
  chosen = np.argpartition(scores, shape.choices - 1, axis=1)[:, : shape.choices]
  return chosen.astype(np.int32).reshape(-1)


class Operation(NamedTuple):
  """What is raced on one shape.

  Attributes:
    names: bodies.
    arguments: trained arrays, then the others.
    trained: how many are differentiated.
    call: `(implementation, *arguments) -> out`.
    rivals: other implementations by name.
    flops: of the forward pass; the backward has twice as many.
  """

  names: tuple[str, ...]
  arguments: tuple
  trained: int
  call: Callable
  rivals: dict[str, Callable]
  flops: int


def _normal(seed: int, dtype, *shape):
  return (jax.random.normal(jax.random.key(seed), shape) * shape[-2] ** -0.5).astype(dtype)


def matmul_operation(shape: Shape, dtype) -> Operation:
  """The up projection of packed rows."""
  _, t, d, f, e, k, _ = shape
  sizes = jnp.asarray(np.bincount(choose_experts(shape), minlength=e), jnp.int32)
  arguments = _normal(0, dtype, t * k, d), _normal(1, dtype, e, d, f), sizes
  call = lambda name, *args: grouped_matmul(*args, implementation=name)
  rivals = {'ragged_dot': jax.lax.ragged_dot}
  if importlib.util.find_spec('tokamax') is not None:
    import tokamax

    rivals['tokamax'] = lambda a, w, s: tokamax.ragged_dot(a, w, group_sizes=s)
  return Operation(MATMUL_NAMES, arguments, 2, call, rivals, 2 * t * k * d * f)


def quantised_operation(shape: Shape, dtype, kind: str = 'int8') -> Operation:
  """The same with weights of eight bits. At the shape decode it takes as long as they take to read."""
  _, t, d, f, e, k, _ = shape
  sizes = jnp.asarray(np.bincount(choose_experts(shape), minlength=e), jnp.int32)
  weights = jax.jit(quantise, static_argnums=1)(_normal(1, 'float32', e, d, f), kind)
  call = lambda name, lhs, values, scale, sizes: quantised_matmul(
    lhs, Quantised(values, scale), sizes, implementation=name
  )
  arguments = _normal(0, dtype, t * k, d), *weights, sizes
  return Operation(QUANTISED_NAMES, arguments, 0, call, {}, 2 * t * k * d * f)


def ffn_operation(shape: Shape, dtype) -> Operation:
  """The whole gated layer of given experts."""
  _, t, d, f, e, k, _ = shape
  weights = _normal(1, dtype, e, d, f), _normal(2, dtype, e, d, f), _normal(3, dtype, e, f, d)
  weight = jax.random.uniform(jax.random.key(4), (t * k,))
  arguments = _normal(0, dtype, t, d), weight, *weights, jnp.asarray(choose_experts(shape))

  def call(name, x, weight, gate, up, down, expert):
    token = jnp.arange(t * k, dtype=jnp.int32) // k
    routing = Routing(token, expert, weight, e, t)
    return expert_ffn(x, routing, gate, up, down, activation='silu', implementation=name)

  def ragged(x, weight, gate, up, down, expert):
    plan = packed.sort_rows(expert, e)
    dot = lambda a, w: jax.lax.ragged_dot(a, w, plan.starts[1:] - plan.starts[:-1])
    rows = x[plan.order // k]
    y = dot(jax.nn.silu(dot(rows, gate)) * dot(rows, up), down)[plan.position]
    return jnp.sum((y * weight[:, None].astype(y.dtype)).reshape(t, k, d), axis=1)

  return Operation(FFN_NAMES, arguments, 5, call, {'ragged_dot': ragged}, 6 * t * k * d * f)


def pack_operation(shape: Shape, dtype) -> Operation:
  """Where the rows of each expert lie; no FLOPs."""
  function = lambda name, expert: registry.run(
    'pallas_kernels.routing', 'pack', name, expert, num_experts=shape.experts
  )
  names = tuple(name for name in ROUTING_NAMES if name != 'reference')
  return Operation(names, (jnp.asarray(choose_experts(shape)),), 0, function, {}, 0)


def top_k_operation(shape: Shape, dtype) -> Operation:
  """Softmax and the best K of E."""
  logits = jax.random.normal(jax.random.key(0), (shape.tokens, shape.experts))
  call = lambda name, logits: top_k(logits, shape.choices, implementation=name)
  return Operation(ROUTING_NAMES, (logits,), 0, call, {}, 0)


OPERATIONS = {
  'expert_ffn': ffn_operation,
  'grouped_matmul': matmul_operation,
  'pack': pack_operation,
  'quantised_matmul': quantised_operation,
  'quantised_matmul_e4m3': functools.partial(quantised_operation, kind='float8_e4m3fn'),
  'top_k': top_k_operation,
}


def compiled(function: Callable, arguments, trained: int) -> dict[str, Callable]:
  """Programs that run without arguments: forward, and forward with backward where something is trained."""
  programs = {'forward': function}
  if trained:

    def both(*arguments):
      out, pull = jax.vjp(lambda *w: function(*w, *arguments[trained:]), *arguments[:trained])
      return out, pull(out)

    programs['both'] = both
  return {
    name: functools.partial(jax.jit(program).lower(*arguments).compile(), *arguments)
    for name, program in programs.items()
  }


def dense(flops: int, dtype, width: int = 4096) -> tuple[dict[str, Callable], int]:
  """(a square matmul of random numbers, about as long as `flops` take and at most of this width; its FLOPs)."""
  size = min(width, max(256, int((flops / 2) ** (1 / 3)) // 128 * 128))
  a, b = _normal(5, dtype, size, size), _normal(6, dtype, size, size)
  return {
    'forward': functools.partial(jax.jit(jnp.matmul).lower(a, b).compile(), a, b)
  }, 2 * size**3


def timed(run: Callable) -> float:
  """Seconds of one call."""
  start = time.perf_counter()
  jax.block_until_ready(run())
  return time.perf_counter() - start


def contestants(operation: str, shape: Shape, dtype):
  """(programs by contestant, why others do not take part, the operation); each program has run once."""
  op = OPERATIONS[operation](shape, dtype)
  functions = {name: functools.partial(op.call, name) for name in op.names if name != 'reference'}
  programs, refused = {}, {}
  for name, function in {**functions, **op.rivals}.items():
    platform = {'ampere': 'gpu'}.get(name, name)
    if platform in ('cpu', 'gpu', 'tpu') and platform != jax.default_backend():
      refused[name] = f'needs a {platform.upper()}'
      continue
    try:
      programs[name] = compiled(function, op.arguments, op.trained)
      for program in programs[name].values():
        timed(program)
    except REFUSALS as error:
      programs.pop(name, None)
      refused[name] = str(error).splitlines()[0][:200]
  return programs, refused, op


def in_torch(operation: str, arguments) -> tuple[dict, dict]:
  """(contestants of torch and Triton where these are installed and see a GPU, why others do not take part)."""
  name = {'grouped_matmul': 'torch', 'expert_ffn': 'triton'}.get(operation)
  if name is None or any(importlib.util.find_spec(one) is None for one in {name, 'torch'}):
    return {}, {}
  try:
    return importlib.import_module(f'bench_{name}').contestants(arguments), {}
  except RuntimeError as error:  # of memory that is not there, of a kernel that does not compile
    return {}, {name: str(error).splitlines()[0][:200]}


def race(programs: dict, rounds: int, seconds: float) -> dict:
  """Median seconds of each (contestant, direction); they take turns of 20 ms at least, for `seconds` each."""
  entries = {(name, part): run for name, parts in programs.items() for part, run in parts.items()}
  # An accelerator gets its calls queued; on a CPU, queueing them would be timed too.
  wait = jax.block_until_ready if jax.default_backend() == 'cpu' else lambda result: result
  times = {key: [] for key in entries}
  repeats = dict.fromkeys(entries, 1)
  for turn in range(rounds):
    for key, run in entries.items():
      if not turn or sum(times[key]) * repeats[key] < seconds:
        burst = lambda run=run, key=key: [wait(run()) for _ in range(repeats[key])]
        times[key].append(timed(burst) / repeats[key])
      if not turn:
        repeats[key] = max(1, min(100, int(0.02 / times[key][0])))
  # The first turn is a call by itself.
  return {key: statistics.median(values[1:] or values) for key, values in times.items()}


def contest(operation: str, shape: Shape, dtype, rounds: int, seconds: float) -> list[dict]:
  """Races all bodies and rivals, prints a table, returns its rows."""
  programs, refused, op = contestants(operation, shape, dtype)
  dense_flops = 0
  if op.flops:
    programs['dense'], dense_flops = dense(op.flops, dtype)
  theirs, why = in_torch(operation, op.arguments)
  programs, refused = programs | theirs, refused | why
  median = race(programs, rounds, seconds)
  ceiling = dense_flops / median['dense', 'forward'] if op.flops else None
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  rows = []
  print(f'\n{operation} {shape.name} {jnp.dtype(dtype).name} {shape[1:]}')
  for (name, part), took in median.items():
    flops = dense_flops if name == 'dense' else op.flops
    if part == 'both':
      part, took, flops = 'backward', took - median[name, 'forward'], 2 * flops
    rate = flops / took
    moved = None if name == 'dense' else size(op.arguments) + size(programs[name]['forward']())
    row = dict(operation=operation, shape=shape.name, implementation=name, direction=part)
    row |= dict(milliseconds=1e3 * took, tflops=rate / 1e12, bytes=moved)
    row |= dict(of_ceiling=rate / ceiling if ceiling else None)
    rows.append(row)
    share = f'{row["of_ceiling"]:8.2f}' if ceiling else ' ' * 8
    speed = f'{row["tflops"]:9.3f} TFLOP/s {share} of dense' if flops else ' ' * 34
    print(
      f'{name:>12} {part:>8} {row["milliseconds"]:10.3f} ms {speed} {(moved or 0) / 1e6:9.1f} MB'
    )
  for name, reason in refused.items():
    print(f'{name:>12} does not take part: {reason}')
    rows.append(dict(operation=operation, shape=shape.name, implementation=name, refused=reason))
  return rows


def check(dtype) -> list[dict]:
  """Correctness of each body on this device, at widths that every body takes."""
  import bench_cases

  rows = bench_cases.run(dtype, jax.default_backend(), REFUSALS)
  for row in rows:
    print('{operation:>15} {implementation:>8} {case:<45} {result}'.format(**row))
  return rows


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--shapes', nargs='+', default=['A', 'B', 'C', 'A-skewed'], choices=SHAPES)
  parser.add_argument('--only', nargs='+', default=list(OPERATIONS), choices=OPERATIONS)
  parser.add_argument('--dtype', help='of the matmuls; bfloat16, on a CPU float32')
  parser.add_argument('--rounds', type=int, default=11, help='timed turns of each contestant')
  parser.add_argument('--seconds', type=float, default=10, help='at most this long for each')
  parser.add_argument('--check', action='store_true', help='run the correctness cases first')
  parser.add_argument('--out', type=pathlib.Path, help='write the rows as JSON to this file')
  options = parser.parse_args(arguments)
  keep_freed_memory()  # as experiments.train
  # JAX leaves memory to torch: it takes what it needs, not three quarters at once.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  on_cpu = jax.default_backend() == 'cpu'
  dtype = jnp.dtype(options.dtype or ('float32' if on_cpu else 'bfloat16'))
  checked = check(dtype) if options.check else []
  rows = []
  for name in options.shapes:
    for operation in options.only:
      rows += contest(operation, SHAPES[name], dtype, options.rounds, options.seconds)
  if options.out:
    found = {**conditions(), 'dtype': dtype.name, 'checked': checked, 'rows': rows}
    options.out.write_text(json.dumps(found, indent=1) + '\n')
  backend = jax.default_backend()
  print('\n' + advice(rows, 'cuda' if backend == 'gpu' else backend))
  wrong = [row for row in checked if row['result'].startswith('WRONG')]
  return len(wrong)


if __name__ == '__main__':
  sys.exit(main())
