"""Compiles grouped_matmul and expert_ffn for an A100 on a machine without one and prints what came out.

A JSON object a kernel. Run by test_ampere_compiled.py in a process of its own, as compile_for_h200.py is by its test.
Needs jax 0.11 or newer, the wheels of the extra `aot_cuda` and a `ptxas`.
"""

import functools
import json
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import packed
from pallas_kernels.ampere import machine
from pallas_kernels.ampere import rows as ampere_rows
from pallas_kernels.expert_ffn import ampere as ffn_body
from pallas_kernels.grouped_matmul import ampere

HERE = pathlib.Path(__file__).parent
EMULATED = 128, 256  # widths of the matrices


def matmul(rows, dtype, *, transpose_rhs, weights):
  """Value and both gradients."""
  width_in, width_out, experts = 1024, 512, 16

  def run(lhs, rhs, starts, dout):
    options = dict(transpose_rhs=transpose_rhs)
    out = ampere.forward(lhs, rhs, starts, **options)
    return out, ampere.backward(lhs, rhs, starts, dout, **options)

  struct = jax.ShapeDtypeStruct
  matrix = (width_out, width_in) if transpose_rhs else (width_in, width_out)
  starts = struct((experts + 1,), jnp.int32)
  lhs, dout = struct((rows, width_in), dtype), struct((rows, width_out), dtype)
  return run, (lhs, struct((experts, *matrix), weights), starts, dout)


def layer(tokens, choices, experts, dtype, *, weights, sides=2):
  """Value and all gradients of expert_ffn."""
  width, hidden = 1536, 256
  token = np.arange(tokens * choices, dtype=np.int32) // choices

  def run(x, weight, expert, into, down, dy):
    rows = jnp.asarray(token), weight, packed.sort_rows(expert, experts)
    options = dict(activation='silu', groups=tokens)
    y, pre = ffn_body.forward(x, *rows, into, down, **options, save=tokens * choices)
    return y, ffn_body.backward(x, *rows, into, down, pre, dy, **options)

  struct = jax.ShapeDtypeStruct
  x, row = struct((tokens, width), dtype), (tokens * choices,)
  rows = struct(row, jnp.float32), struct(row, jnp.int32)
  into = (struct((experts, width, hidden), weights),) * sides
  return run, (x, *rows, into, struct((experts, hidden, width), weights), x)


PROGRAMS = {
  'wide': lambda: matmul(8192, jnp.bfloat16, transpose_rhs=False, weights=jnp.bfloat16),
  'narrow': lambda: matmul(515, jnp.float16, transpose_rhs=True, weights=jnp.float32),
  'layer': lambda: layer(2048, 8, 128, jnp.bfloat16, weights=jnp.float32),
  'plain layer': lambda: layer(333, 1, 8, jnp.float16, weights=jnp.float16, sides=1),
}


def emulated(name):
  """A kernel of grouped_matmul, small enough to run on a CPU instruction by instruction (test_ampere_emulated.py).

  `name`: 'out', 'dlhs' or 'drhs', type of the rows, their number, and type of the result, with '-' between.
  """
  part, dtype, rows, result = name.split('-')
  struct = jax.ShapeDtypeStruct
  dtype, num_rows, (width_in, width_out), experts = jnp.dtype(dtype), int(rows), EMULATED, 3
  rows = {'lhs': struct((num_rows, width_in), dtype), 'dout': struct((num_rows, width_out), dtype)}
  starts = struct((experts + 1,), jnp.int32)
  if part == 'drhs':

    def sums(left, right, starts):
      return ampere_rows.sums(machine.HARDWARE, left, right, starts, jnp.dtype(result))

    return sums, (rows['lhs'], rows['dout'], starts)
  matrices = struct((experts, width_in, width_out), dtype)
  options = dict(transpose_rhs=part == 'dlhs')
  run = functools.partial(ampere.forward, **options)
  return run, (rows['lhs' if part == 'out' else 'dout'], matrices, starts)


def facts(folder):
  """What each dumped kernel asks of the machine."""
  for path in sorted(pathlib.Path(folder).glob('*.ptx')):
    ptx, ptxas = path.read_text(), path.with_suffix('.ptxas').read_text()
    with path.with_suffix('.mlir-passes.log').open(encoding='utf-8', errors='replace') as log:
      shared = re.search(r'dynamic_shared_memory_size %c(\d+)', log.read())
    yield {
      'kernel': path.stem,
      'target': re.search(r'\.target (\w+)', ptx)[1],
      'products': sorted(set(re.findall(r'mma\.sync\.aligned\.(\w+)\.', ptx))),
      'types': sorted(set(re.findall(r'mma\.sync\S+\.col\.f32\.(\w+)\.', ptx))),
      'copies': sorted(set(re.findall(r'cp\.async\.(c[ag])\.\S+ \[\S+\], \[\S+\], (\d+)', ptx))),
      'waits': sorted({int(n) for n in re.findall(r'cp\.async\.wait_group\s+(\d+)', ptx)}),
      'loads of operands': len(re.findall(r'ldmatrix\S+\.x4\.', ptx)),
      'stores': sorted(set(re.findall(r'\n\s*st\.(?:global\.)?(v4\.b32|b16|b32)', ptx))),
      'registers': int(re.search(r'Used (\d+) registers', ptxas)[1]),
      'stack': int(re.search(r'(\d+) bytes stack frame', ptxas)[1]),
      'spills': [int(n) for n in re.findall(r'(\d+) bytes spill', ptxas)],
      'shared memory': int(shared[1]) if shared else None,
    }


def main(folder, *names):
  """Compiles PROGRAMS, or those of `names` that `emulated` knows."""
  programs = {name: functools.partial(emulated, name) for name in names} or PROGRAMS
  for what in ('PTX', 'PTXAS', 'MLIR_PASSES'):
    os.environ[f'MOSAIC_GPU_DUMP_{what}'] = '1'
  config = ''.join(
    line for line in (HERE / 'a100.txtpb').open(encoding='utf-8') if not line.startswith('#')
  )
  described = dict(platform='cuda', topology='1x1x1', target_config=config)
  device = topologies.get_topology_desc(**described).devices[0]
  jax.config.update('jax_default_device', device)  # tells Mosaic that it is none of Hopper's
  sharding = NamedSharding(Mesh(np.array([device]), ('x',)), PartitionSpec())
  for name, make in programs.items():
    scratch = pathlib.Path(folder, name.replace(' ', '_'))
    scratch.mkdir()
    os.environ['MOSAIC_GPU_DUMP_TO'] = str(scratch)
    program, arguments = make()
    jitted = jax.jit(program, in_shardings=sharding, out_shardings=sharding)
    jitted.lower(*arguments).compile()
    for found in facts(scratch):
      print(json.dumps({'program': name, **found}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
