"""Rows at given indices into shared memory, zeros for the index -1.

Hopper's bulk copies cannot gather (tile::gather4 needs sm_100), so the loading warpgroup's threads copy 16 bytes each
by `cp.async`, into the places that the 128-byte swizzle of wgmma asks for; a source size of 0 fills with zeros. The
copies are written through the generic proxy: who waits for them must fence before the tensor cores read (ring.fill).
The interpreter knows no machine instructions; there every row is a bulk copy of its own.
"""

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from .compat import pl, plgpu
from .ring import transforms
from .target import Target

PIECE = 16  # bytes of one copy
ATOM = 128  # bytes of a swizzled line
THREADS = 128


def scratch(target: Target, stages: int, rows: int) -> dict:
  """What the ring needs to know of gathered rows: nothing on hardware."""
  if target.gather == 'cp_async':
    return {}
  return {'landed': plgpu.Barrier(num_arrivals=rows, num_barriers=stages)}


def prepare(target: Target, source: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What the kernel reads: simulated copies find the zeros of index -1 in a row after the last one."""
  if target.gather == 'cp_async':
    return source, index
  zeros = jnp.zeros((1, source.shape[1]), source.dtype)
  return jnp.concatenate([source, zeros]), jnp.where(index < 0, source.shape[0], index)


def start(target: Target, source, index, first, column, stage, landed=None):
  """Starts to copy `source[index[first + r], column:]` to row r of `stage [rows, width]`.

  `landed`: the barrier of the stage, where simulated.
  """
  if target.gather == 'cp_async':
    kinds = (plgpu.RefType(), plgpu.RefType(), plgpu.RefType(transforms(source.dtype)))
    splat = plgpu.Layout.WG_SPLAT
    plgpu.inline_mgpu(arg_types=(*kinds, splat, splat))(_start)(source, index, stage, first, column)
    return

  rows, width = stage.shape

  @pl.loop(0, rows)
  def _(r):
    row = index[first + r]
    from_ref = source.at[pl.ds(row, 1), pl.ds(column, width)]
    plgpu.copy_gmem_to_smem(from_ref, stage.at[pl.ds(r, 1), :], landed)


def wait(target: Target, pending: int, landed=None):
  """Returns once at most `pending` of this thread's last starts are under way."""
  if target.gather == 'cp_async':
    instruction = f'cp.async.wait_group {pending};'
    plgpu.inline_mgpu()(lambda ctx: _asm([], instruction, '~{memory}'))()
  else:
    plgpu.barrier_wait(landed)


def _start(ctx, source, index, stage, first, column):
  """Emits the copies of one thread: piece by piece, rows strided over the warpgroup."""
  del ctx
  i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  const = lambda value, kind=i32: utils.c(value, kind)
  low, high, lines, width = ir.MemRefType(stage.type).shape
  rows, atoms = low * lines, high
  assert width * 2 == ATOM
  pieces = atoms * ATOM // PIECE  # of a row

  thread = arith.remui(utils.thread_idx(), const(THREADS))
  piece = arith.remui(thread, const(pieces))
  top = arith.divui(thread, const(pieces))
  row_bytes = ir.MemRefType(source.type).shape[1] * 2
  base = llvm.ptrtoint(i64, utils.memref_ptr(source))
  offset = arith.addi(_shift(first_scalar(column), 1), _shift(piece, 4))
  base = arith.addi(base, arith.extui(i64, offset))
  indices = llvm.ptrtoint(i64, utils.memref_ptr(index))
  start_row = arith.addi(first_scalar(first), top)
  indices = arith.addi(indices, arith.extui(i64, _shift(start_row, 2)))
  shared = llvm.ptrtoint(i32, utils.memref_ptr(stage))

  step = THREADS // pieces  # rows between the copies of a thread
  for i in range(rows // step):
    row = arith.addi(top, const(i * step))
    line = arith.andi(row, const(lines - 1))
    tile = arith.addi(
      arith.muli(arith.shrui(row, const(3)), const(atoms)), arith.shrui(piece, const(3))
    )
    swizzled = arith.xori(arith.andi(piece, const(7)), line)
    place = arith.addi(_shift(tile, 10), arith.addi(_shift(line, 7), _shift(swizzled, 4)))
    _asm(
      [arith.addi(shared, place), arith.addi(indices, const(i * step * 4, i64)), base],
      '{ .reg .b32 index, size; .reg .b64 from; .reg .pred inside;'
      ' ld.global.nc.b32 index, [$1];'
      ' setp.ge.s32 inside, index, 0;'
      ' selp.b32 size, 16, 0, inside;'
      ' max.s32 index, index, 0;'
      f' mad.wide.u32 from, index, {row_bytes}, $2;'
      ' cp.async.cg.shared.global [$0], [from], 16, size; }',
      'r,l,l,~{memory}',
    )
  _asm([], 'cp.async.commit_group;', '~{memory}')


def first_scalar(value):
  """The one register of a scalar argument."""
  return value.registers.item()


def _shift(value, bits):
  return arith.shli(value, utils.c(bits, value.type))


def _asm(operands, text, constraints):
  llvm.inline_asm(ir.Type.parse('!llvm.void'), operands, text, constraints, has_side_effects=True)
