"""Compiles programs for an H200 on a machine without one and prints what came out, a JSON object a kernel.

Run by test_gpu_compiled.py in a process of its own: the CUDA plugin would otherwise load into the test session.
Needs the wheels of the extra `aot_cuda` and a `ptxas`. Mosaic, LLVM's NVPTX backend and ptxas run as they do beside
a GPU; kernels.mlir.log, .ptx and .ptxas of each kernel are left in the folder given as argument.
"""

import json
import os
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import expert_ffn, packed
from pallas_kernels.expert_ffn import gpu as ffn_body
from pallas_kernels.grouped_matmul import gpu as matmul_body
from pallas_kernels.quantised_matmul import gpu as quantised_body
from pallas_kernels.routing import gpu as routing_body

HERE = pathlib.Path(__file__).parent
NARROW = jnp.bfloat16
# T, d, n, E, K: fine-grained, coarse, and decoding.
SHAPES = {
  'fine': (24576, 1536, 256, 128, 8),
  'coarse': (32768, 4096, 14336, 8, 2),
  'decode': (256, 2048, 1024, 64, 8),
}


def struct(*shape, dtype=NARROW):
  return jax.ShapeDtypeStruct(shape, dtype)


def matmul(*, gather, transpose_rhs):
  """Value and both gradients of grouped_matmul, bfloat16 rows and float16 ones in one program each."""
  dtype = jnp.float16 if transpose_rhs else NARROW
  rows, width_in, width_out, experts = 8192, 1024, 512, 16

  def run(lhs, rhs, starts, dout):
    options = dict(transpose_rhs=transpose_rhs, gather=gather)
    out = matmul_body.forward(lhs, rhs, starts, **options)
    return out, matmul_body.backward(lhs, rhs, starts, dout, **options)

  matrix = (width_out, width_in) if transpose_rhs else (width_in, width_out)
  starts = struct(experts + 1, dtype=jnp.int32)
  lhs, dout = struct(rows, width_in, dtype=dtype), struct(rows, width_out, dtype=dtype)
  return run, (lhs, struct(experts, *matrix, dtype=dtype), starts, dout)


def layer(shape, *, gated=True, activation='silu', weights=NARROW):
  """Value and all gradients of expert_ffn."""
  tokens, width, hidden, experts, choices = SHAPES[shape]
  token = np.arange(tokens * choices, dtype=np.int32) // choices

  def run(x, weight, w_gate, w_up, w_down, expert):
    def loss(x, weight, w_gate, w_up, w_down):
      assignment = types.SimpleNamespace(
        token=jnp.asarray(token), expert=expert, weight=weight, num_experts=experts, groups=tokens
      )
      matrices = (w_gate if gated else None, w_up, w_down)
      y = expert_ffn(x, assignment, *matrices, activation=activation, implementation='gpu')
      return jnp.sum(jnp.square(y.astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(x, weight, w_gate, w_up, w_down)

  rows = struct(tokens * choices, dtype=jnp.float32), struct(tokens * choices, dtype=jnp.int32)
  up, down = (struct(experts, *s, dtype=weights) for s in ((width, hidden), (hidden, width)))
  return run, (struct(tokens, width), rows[0], up, up, down, rows[1])


def layer_without_gather():
  """The variant that reads rows which XLA has gathered, without saving anything; in float16."""
  tokens, width, hidden, experts, choices = SHAPES['fine']

  def run(x, token, weight, expert, w_gate, w_up, w_down):
    plan = packed.sort_rows(expert, experts)
    options = dict(activation='relu2', groups=tokens, save=0, gather=False)
    return ffn_body.forward(x, token, weight, plan, (w_gate, w_up), w_down, **options)[0]

  rows = [struct(tokens * choices, dtype=kind) for kind in (jnp.int32, jnp.float32, jnp.int32)]
  half = lambda *shape: struct(*shape, dtype=jnp.float16)
  up = half(experts, width, hidden)
  return run, (half(tokens, width), *rows, up, up, half(experts, hidden, width))


def quantised(kind, dtype, rows, *, experts=64, width_in=2048, width_out=1024, gather=True):
  """quantised_matmul with `rows` rows a group."""

  def run(lhs, values, scale, starts):
    return quantised_body.forward(lhs, values, scale, starts, gather=gather)

  weights = struct(experts, width_in, width_out, dtype=kind)
  scale = struct(experts, 1, width_out, dtype=jnp.float32)
  starts = struct(experts + 1, dtype=jnp.int32)
  return run, (struct(rows * experts, width_in, dtype=dtype), weights, scale, starts)


def routing(tokens, experts, choices, packed_among):
  """Choices of tokens, and rows packed among another number of experts."""

  def run(logits, expert):
    best = routing_body.top_k(logits, k=choices)
    return best, routing_body.pack(expert, num_experts=packed_among)

  logits = struct(tokens, experts, dtype=jnp.float32)
  return run, (logits, struct(tokens * choices, dtype=jnp.int32))


PROGRAMS = {
  'matmul gathered': lambda: matmul(gather=True, transpose_rhs=False),
  'matmul contiguous': lambda: matmul(gather=False, transpose_rhs=True),
  'layer fine': lambda: layer('fine'),
  'layer coarse plain': lambda: layer('coarse', gated=False, activation='gelu'),
  'layer decode': lambda: layer('decode', weights=jnp.float32),
  'layer contiguous': layer_without_gather,
  'quantised 8': lambda: quantised(jnp.int8, NARROW, 8),
  'quantised 32': lambda: quantised(jnp.float8_e4m3fn, NARROW, 32),
  'quantised 64': lambda: quantised(jnp.float8_e4m3fn, jnp.float16, 64),
  'quantised 128': lambda: quantised(jnp.int8, NARROW, 128),
  'quantised contiguous': lambda: quantised(
    jnp.int8, jnp.float16, 4, experts=8, width_out=384, gather=False
  ),
  'routing fine': lambda: routing(24576, 128, 8, 128),
  'routing most': lambda: routing(1000, routing_body.MOST_TOP_K, 256, routing_body.MOST_PACKED),
}


def emulated(name):
  """quantised_matmul, small enough to run on a CPU instruction by instruction (test_gpu_emulated.py).

  `name`: type of the weights, type of the rows, columns, and rows a group, with '-' between.
  """
  kind, dtype, columns, rows = name.split('-')
  options = dict(experts=3, width_in=128, width_out=int(columns), gather=False)
  return quantised(jnp.dtype(kind), jnp.dtype(dtype), int(rows), **options)


def facts(folder):
  """What each dumped kernel asks of the machine."""
  for path in sorted(pathlib.Path(folder).glob('*.ptx')):
    ptx, ptxas = path.read_text(), path.with_suffix('.ptxas').read_text()
    with path.with_suffix('.mlir-passes.log').open(encoding='utf-8', errors='replace') as log:
      shared = re.search(r'dynamic_shared_memory_size %c(\d+)', log.read())
    yield {
      'kernel': re.sub(r'_\d+$', '', path.stem),
      'products': sorted(set(re.findall(r'wgmma\.mma_async\.sync\.aligned\.(\w+)\.', ptx))),
      'left': sorted(
        {
          'registers' if brace else 'memory'
          for brace in re.findall(r'wgmma\.mma_async\S+ \{[^}]*\}, (\{?)', ptx)
        }
      ),
      'gathers': re.findall(r'cp\.async\.(c[ag])\.\S+ \[\S+\], \[\S+\], (\d+)', ptx),
      'bulk loads': len(re.findall(r'cp\.async\.bulk\.tensor\S*shared\S*global', ptx)),
      'waits': [int(n) for n in re.findall(r'cp\.async\.wait_group\s+(\d+)', ptx)],
      'shares': [int(n) for n in re.findall(r'setmaxnreg\S+\s+(\d+)', ptx)],
      'registers': int(re.search(r'Used (\d+) registers', ptxas)[1]),
      'stack': int(re.search(r'(\d+) bytes stack frame', ptxas)[1]),
      'spills': [int(n) for n in re.findall(r'(\d+) bytes spill', ptxas)],
      'serialised': 'serializ' in ptxas,
      'shared memory': int(shared[1]) if shared else None,
    }


def main(folder, *names):
  """Compiles PROGRAMS, or those of `names` that `emulated` knows."""
  programs = {name: lambda name=name: emulated(name) for name in names} or PROGRAMS
  os.environ['MOSAIC_GPU_DUMP_TO'] = folder
  for what in ('PTX', 'PTXAS', 'MLIR_PASSES'):
    os.environ[f'MOSAIC_GPU_DUMP_{what}'] = '1'
  config = ''.join(
    line for line in (HERE / 'h200.txtpb').open(encoding='utf-8') if not line.startswith('#')
  )
  described = dict(platform='cuda', topology='1x1x1', target_config=config)
  topology = topologies.get_topology_desc(**described)
  mesh = Mesh(np.array(topology.devices[:1]), ('x',))
  sharding = NamedSharding(mesh, PartitionSpec())
  for name, make in programs.items():
    scratch = pathlib.Path(folder, name.replace(' ', '_'))
    scratch.mkdir()
    os.environ['MOSAIC_GPU_DUMP_TO'] = str(scratch)
    program, arguments = make()
    jitted = jax.jit(program, in_shardings=sharding, out_shardings=sharding)
    loops = jitted.lower(*arguments).compile().as_text().count(' while(')
    for found in facts(scratch):
      print(json.dumps({'program': name, 'loops': loops, **found}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
