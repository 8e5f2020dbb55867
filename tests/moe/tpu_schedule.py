"""Prints as JSON what the compiled schedule of an exchange has between the start and the end of each transfer.

`python -m tests.moe.tpu_schedule v5p:2x2x1 '{"chunks": 2}' '{"xla_tpu_enable_async_all_to_all": "true"}'`: topology,
options of the exchange, options of the compiler, and a fourth word 'gradient' for both passes. With the option 'kernel'
it is the ragged exchange, and the kernels are printed that it calls.
"""

import json
import os
import re
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import MoE
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.mesh.rules import param_shardings
from moejax.mesh.traffic import collectives
from moejax.moe.exchange import make_exchange

D, F, E, S = 1024, 2048, 8, 2048


def compiled(topology, options, compiler, gradient):
  """The forward pass, or both, of a layer of all devices, a sequence each, in bfloat16, lowered and compiled."""
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  name, fsdp = ('ragged_all_to_all', 2) if 'kernel' in options else ('all_to_all', 1)
  mesh = make_mesh(1, fsdp, len(devices) // fsdp, devices=devices)
  exchange = make_exchange(name, mesh, BATCH_AXES, options)
  layer = lambda: MoE(
    D, F, E, {'name': 'top_k', 'k': 2}, exchange=exchange, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
  )
  graph, state, rest = nnx.split(nnx.eval_shape(layer), nnx.Param, ...)
  shapes = nnx.to_pure_dict(state)
  placed = jax.tree.map(
    lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
    shapes,
    param_shardings(mesh, {'moe': shapes})['moe'],
  )
  nnx.replace_by_pure_dict(state, placed)
  x = jax.ShapeDtypeStruct(
    (len(devices), S, D), jnp.bfloat16, sharding=NamedSharding(mesh, P(BATCH_AXES))
  )
  run = lambda state, x: nnx.merge(graph, state, rest)(x)[0]
  if gradient:
    value, run = run, jax.grad(lambda *args: value(*args).astype(jnp.float32).sum(), (0, 1))
  lowered = jax.jit(run).lower(state, x)
  return lowered, lowered.compile(compiler_options=compiler), len(devices)


def transfers(text):
  """Of each transfer of rows in the schedule, the operations between start and end: 'dot_general' and others."""
  lines = text[text.index('\nENTRY ') :].splitlines()
  found = []
  for start, line in enumerate(lines):
    opened = re.match(r'\s*%?(all-to-all-start[\w.]*) = \(*bf16', line)
    if opened:
      done = rf'all-to-all-done\(.*%{re.escape(opened[1])}\)'
      end = next(i for i, other in enumerate(lines) if re.search(done, other))
      between = re.findall(r'op_name="[^"]*/([\w-]+)"', '\n'.join(lines[start + 1 : end]))
      found.append(sorted(set(between)))
  return found


def main():
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # else libtpu asks the network where it is
  lowered, program, devices = compiled(
    sys.argv[1], *map(json.loads, sys.argv[2:4]), sys.argv[4:] == ['gradient']
  )
  kernels = sorted(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))
  told = {'kernels': kernels}
  if not kernels:
    told['transfers'] = transfers(program.as_text())
    told['sources'] = [one.source for one in collectives(program, devices)]
  print(json.dumps(told), flush=True)


if __name__ == '__main__':
  main()
