"""Compiles programs for a TPU topology and prints what came out as JSON: `python -m ... v6e:2x2 [--full-matrix]`.

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
  exchange_matmul,
  expert_ffn,
  grouped_matmul,
  hidden,
  matmul_exchange,
  pack,
  quantised_matmul,
  ragged_all_to_all,
  top_k,
)

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
MIB = 2**20
# Of every program: the visits of a kernel's tiles, a dozen tables of at most 2112 integers each, and scalars.
TABLES = 0.25


class Program(NamedTuple):
  """A function of arrays of these shapes and types.

  Attributes:
    operation: the folder of pallas_kernels.
    name: of the program.
    function: of arrays.
    args: `(shape, dtype)` of each; tuples of them are tuples of arrays.
    kernels: names of the kernels that it must call.
    temporary_mib: memory besides arguments and results is less than this, which the shapes and TABLES give. A matmul
      has none: a copy of an operand would be more.
    specs: of each argument, for a program of all N devices along one axis, whose result is cut along its rows; an axis
      of -1 has N entries. None for a program of one device.
    long: compiles for minutes, with --full-matrix only.
  """

  operation: str
  name: str
  function: Callable
  args: tuple
  kernels: tuple[str, ...]
  temporary_mib: float
  specs: tuple[P, ...] | None = None
  long: bool = False


def _lanes(width):
  """Columns that an axis takes in memory, where 128 lie side by side."""
  return -(-width // 128) * 128


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
  mib = TABLES
  # Operands and results of odd widths are turned around: outside of the kernels XLA lays them out without padding.
  if inner % 128 or columns % 128:
    row = 2 * rows * (_lanes(inner) + _lanes(columns))
    mib += (row + 2 * groups * inner * _lanes(columns)) * jnp.dtype(dtype).itemsize / MIB
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


def _ffn(name, t, d, f, e, k, dtype, activation, matrices=2, long=False):
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
  # Each intermediate array once, for XLA may begin all gathers early: rows of x and dy, rows of y and dx as the experts
  # give them and again token by token; pre-activations and their gradients; the hidden layer, twice.
  row = 6 * _lanes(d) + 2 * (matrices + 1) * _lanes(f)
  mib = TABLES + t * k * row * jnp.dtype(dtype).itemsize / MIB
  return Program('expert_ffn', f'expert_ffn {name}', run, args, kernels, mib, long=long)


def _quantised(name, dtype):
  run = lambda *a: quantised_matmul(a[0], Quantised(*a[1:3]), a[3], implementation='tpu')
  args = ((2048, 2048), BF16), ((64, 2048, 1024), dtype), ((64, 1, 1024), F32), ((64,), I32)
  return Program('quantised_matmul', name, run, args, ('quantised_matmul',), TABLES)


def _exchanged(name, rows, d, f, e, dtype):
  """A layer of `e` experts, and its gradients; `rows` of all devices, a quarter more places for them."""

  def run(x, sizes, gate, up, down, dy):
    devices, options = sizes.shape[0], dict(axis_name='expert', implementation='tpu')
    sizes = sizes.reshape(devices, devices, -1)

    def layer(x, gate, up, down):
      room = x.shape[0] * 5 // 4
      pre = exchange_matmul(x, sizes, (gate, up), num_out_rows=room, **options)
      a = hidden('silu', pre)
      return matmul_exchange((a,), sizes, (down,), num_out_rows=x.shape[0], **options)

    y, pull = jax.vjp(layer, x, gate, up, down)
    return y, pull(dy)

  matrix = ((e, d, f), dtype)
  args = ((rows, d), dtype), ((-1, e), I32), matrix, matrix, ((e, f, d), dtype), ((rows, d), dtype)
  specs = P('expert'), P(), *(P('expert'),) * 4
  each = ('exchange_matmul', 'matmul_exchange', 'exchange_matmul_drhs')
  # On each of four devices: the rows that came in both passes, pre-activations, the hidden layer and its gradient, and
  # one of either width without what lies between segments.
  numbers = rows * 5 // 16 * (3 * _lanes(d) + 5 * _lanes(f))
  if d % 128 or f % 128:  # operands and results are turned around, see _grouped
    numbers += rows * _lanes(d) + 6 * e // 4 * d * _lanes(f)
  mib = TABLES + numbers * jnp.dtype(dtype).itemsize / MIB
  return Program('exchange_matmul', name, run, args, 2 * each, mib, specs=specs)


PROGRAMS = (
  _grouped('A up transposed', 262144, 64, 2048, 1024, BF16, transpose_rhs=True),
  _grouped('B down', 196608, 128, 256, 1536, BF16),
  _grouped('C down', 65536, 8, 14336, 4096, BF16),
  _grouped('C up in float32', 65536, 8, 4096, 14336, F32),
  _ffn('A', 32768, 2048, 1024, 64, 8, BF16, 'silu', long=True),
  _ffn('B', 24576, 1536, 256, 128, 8, BF16, 'gelu'),
  _ffn('in float32, plain', 8192, 512, 1024, 16, 2, F32, 'relu2', matrices=1),
  _ffn('widths that no tile divides', 96, 8, 12, 4, 1, F32, 'relu'),
  _grouped('widths that no tile divides', 1000, 7, 200, 136, F32),
  _quantised('A up, 256 tokens', jnp.int8),
  _quantised('A up, 256 tokens, e4m3', jnp.float8_e4m3fn),
  Program(
    'ragged_all_to_all',
    'between all devices',
    lambda x, sizes: ragged_all_to_all(
      x, sizes, axis_name='expert', num_out_rows=2048, implementation='tpu'
    ),
    (((8192, 1024), BF16), ((-1, -1), I32)),
    ('ragged_all_to_all',),
    TABLES + 2048 * 1024 * 2 / MIB,  # the result before its rows outside of the segments are zeroed
    specs=(P('expert'), P()),
  ),
  _exchanged('64 experts of all devices', 65536, 2048, 1024, 64, BF16),
  _exchanged('24 experts of all devices, odd widths', 1024, 200, 136, 24, F32),
  Program(
    'routing',
    'top_k of 64',
    lambda x: top_k(x, 8, implementation='tpu'),
    (((32768, 64), F32),),
    ('top_k',),
    # Logits, experts and weights are turned around, 128 lanes a row.
    TABLES + 3 * 32768 * 128 * 4 / MIB,
  ),
  Program(
    'routing',
    'pack into 128',
    lambda e: pack(e, 128, implementation='tpu'),
    (((196608,), I32),),
    ('rank',),
    # The experts that the kernel reads, whole blocks of them; the rank of each row and the start of its expert.
    TABLES + 3 * 196608 * 4 / MIB,
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
  names = re.findall(r'tpu_custom_call.*?kernel_name = "(\w+)"', lowered.as_text())
  return {'kernels': sorted(names), 'temporary_bytes': _temporary(lowered.compile())}


def _temporary(compiled):
  """Bytes of the device's memory besides arguments and results, from two counts that are never less.

  The size of the temporary buffer has 16 KiB for each small value (a scalar, the 32 bytes that stand for a copy under
  way), up to a MiB in all, and gaps. The peak is exact, but has also what lies in the memory of the chip itself.
  """
  memory = compiled.memory_analysis()
  given = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return min(memory.temp_size_in_bytes, memory.peak_memory_in_bytes - given)


def _on(mesh, count, arg, spec):
  shape, dtype = arg
  whole = tuple(count if size == -1 else size for size in shape)
  return jax.ShapeDtypeStruct(whole, dtype, sharding=NamedSharding(mesh, spec))


def programs(full: bool) -> tuple[Program, ...]:
  """All of them, or those that compile in seconds."""
  return tuple(program for program in PROGRAMS if full or not program.long)


def main(topology, *options):
  devices = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
  wanted = programs('--full-matrix' in options)
  print(json.dumps({p.name: describe(p, devices) for p in wanted}), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
