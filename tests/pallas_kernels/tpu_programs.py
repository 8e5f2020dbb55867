"""Compiles programs for a TPU topology and prints what came out as JSON: `python -m ... v6e:2x2`.

Shapes are those of the kernel benchmark: A (T 32768, D 2048, F 1024, E 64, K 8), B (24576, 1536, 256, 128, 8) and
C (32768, 4096, 14336, 8, 2).
"""

import json
import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
  Quantised,
  expert_ffn,
  grouped_matmul,
  pack,
  quantised_matmul,
  ragged_all_to_all,
  top_k,
)

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32


class Program(NamedTuple):
  """A function of arrays of these shapes and types.

  Attributes:
    operation: the folder of pallas_kernels.
    name: of the program.
    function: of arrays.
    args: `(shape, dtype)` of each; tuples of them are tuples of arrays.
    kernels: names of the kernels that it must call.
    temporary_mib: memory besides arguments and results is less than this; a copy of an operand would be more.
    specs: of each argument, for a program of all N devices along one axis, whose result is cut along its rows; an axis
      of -1 has N entries. None for a program of one device.
  """

  operation: str
  name: str
  function: Callable
  args: tuple
  kernels: tuple[str, ...]
  temporary_mib: float
  specs: tuple[P, ...] | None = None


def _gradients(transpose_rhs):
  def run(lhs, rhs, sizes, dout):
    matmul = lambda lhs, rhs: grouped_matmul(
      lhs, rhs, sizes, transpose_rhs=transpose_rhs, implementation='tpu'
    )
    out, pull = jax.vjp(matmul, lhs, rhs)
    return out, pull(dout)

  return run


def _grouped(name, rows, groups, inner, columns, dtype, transpose_rhs=False):
  matrix = (groups, columns, inner) if transpose_rhs else (groups, inner, columns)
  args = ((rows, inner), dtype), (matrix, dtype), ((groups,), I32), ((rows, columns), dtype)
  kernels = ('grouped_matmul', 'grouped_matmul', 'grouped_matmul_drhs')
  # Narrow arrays are padded to the registers' lanes.
  mib = 8 if inner % 128 else 2
  return Program(
    'grouped_matmul', f'grouped_matmul {name}', _gradients(transpose_rhs), args, kernels, mib
  )


class _Routing(NamedTuple):
  token: jax.Array
  expert: jax.Array
  weight: jax.Array
  num_experts: int
  groups: int


def _ffn_gradients(choices, num_experts, activation):
  def run(x, expert, weight, into, w_down, dy):
    def ffn(x, weight, into, w_down):
      token = jnp.arange(expert.shape[0], dtype=jnp.int32) // choices
      routing = _Routing(token, expert, weight, num_experts, x.shape[0])
      gate, up = into if len(into) == 2 else (None, *into)
      options = dict(activation=activation, implementation='tpu')
      return expert_ffn(x, routing, gate, up, w_down, **options)

    y, pull = jax.vjp(ffn, x, weight, into, w_down)
    return y, pull(dy)

  return run


def _ffn(name, t, d, f, e, k, dtype, activation, matrices=2):
  into = (((e, d, f), dtype),) * matrices
  args = (
    ((t, d), dtype),
    ((t * k,), I32),
    ((t * k,), F32),
    into,
    ((e, f, d), dtype),
    ((t, d), dtype),
  )
  kernels = tuple(f'expert_ffn_{name}' for name in ('up', 'down', 'dhidden', 'dx', 'dup', 'ddown'))
  run = _ffn_gradients(k, e, activation)
  # Rows of x, dy, y and dx; pre-activations and their gradients; the hidden layer, twice. A quarter more for what XLA
  # keeps of a gather, and 2 MiB for narrow arrays, which are padded to the registers' lanes.
  buffers = t * k * (4 * d + 2 * (matrices + 1) * f) * jnp.dtype(dtype).itemsize
  return Program('expert_ffn', f'expert_ffn {name}', run, args, kernels, 2 + 1.25 * buffers / 2**20)


PROGRAMS = (
  _grouped('A up transposed', 262144, 64, 2048, 1024, BF16, transpose_rhs=True),
  _grouped('B down', 196608, 128, 256, 1536, BF16),
  _grouped('C down', 65536, 8, 14336, 4096, BF16),
  _grouped('C up in float32', 65536, 8, 4096, 14336, F32),
  _ffn('A', 32768, 2048, 1024, 64, 8, BF16, 'silu'),
  _ffn('B', 24576, 1536, 256, 128, 8, BF16, 'gelu'),
  _ffn('in float32, plain', 8192, 512, 1024, 16, 2, F32, 'relu2', matrices=1),
  _ffn('widths that no tile divides', 96, 8, 12, 4, 1, F32, 'relu'),
  _grouped('widths that no tile divides', 1000, 7, 200, 136, F32),
  Program(
    'quantised_matmul',
    'A up, 256 tokens',
    lambda *a: quantised_matmul(a[0], Quantised(*a[1:3]), a[3], implementation='tpu'),
    (((2048, 2048), BF16), ((64, 2048, 1024), jnp.int8), ((64, 1, 1024), F32), ((64,), I32)),
    ('quantised_matmul',),
    1,
  ),
  Program(
    'ragged_all_to_all',
    'between all devices',
    lambda x, sizes: ragged_all_to_all(
      x, sizes, axis_name='expert', num_out_rows=2048, implementation='tpu'
    ),
    (((8192, 1024), BF16), ((-1, -1), I32)),
    ('ragged_all_to_all',),
    5,  # the result before its rows outside of the segments are zeroed: 4 MiB
    specs=(P('expert'), P()),
  ),
  Program(
    'routing',
    'top_k of 64',
    lambda x: top_k(x, 8, implementation='tpu'),
    (((32768, 64), F32),),
    ('top_k',),
    64,
  ),
  Program(
    'routing',
    'pack into 128',
    lambda e: pack(e, 128, implementation='tpu'),
    (((196608,), I32),),
    ('rank',),
    8,
  ),
)


def describe(program: Program, devices) -> dict:
  """Kernels called and temporary memory (of one device) of the compiled program."""
  is_shape = lambda arg: isinstance(arg[0][0], int)
  one = jax.sharding.SingleDeviceSharding(devices[0])
  function, array = program.function, lambda arg: jax.ShapeDtypeStruct(*arg, sharding=one)
  args = jax.tree.map(array, program.args, is_leaf=is_shape)
  if program.specs is not None:
    mesh, specs = Mesh(np.array(devices), ('expert',)), program.specs
    function = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P('expert'))
    args = [_on(mesh, len(devices), *arg) for arg in zip(program.args, specs, strict=True)]
  lowered = jax.jit(function).lower(*args)
  memory = lowered.compile().memory_analysis()
  names = re.findall(r'tpu_custom_call.*?kernel_name = "(\w+)"', lowered.as_text())
  return {'kernels': sorted(names), 'temporary_bytes': memory.temp_size_in_bytes}


def _on(mesh, count, arg, spec):
  shape, dtype = arg
  whole = tuple(count if size == -1 else size for size in shape)
  return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, spec))


def main():
  devices = topologies.get_topology_desc(platform='tpu', topology_name=sys.argv[1]).devices
  print(json.dumps({p.name: describe(p, devices) for p in PROGRAMS}), flush=True)


if __name__ == '__main__':
  main()
