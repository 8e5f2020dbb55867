"""Weights of eight bits in registers, as wgmma wants its left operand, and products turned back.

wgmma takes its right operand from shared memory only, so the weights are the left one and the rows the right one: what
is multiplied is `(rows @ weights).T`. The weights lie with their columns side by side, `[depth, 128]`, but the left
operand has its depth side by side. A thread reads words, four columns of one row of weights. Which four rows of the
128 of the operand they become is free if the products are turned back alike (Marlin, arXiv 2408.11743, permutes
weights so ahead of time):

  thread t holds the columns 4 (t // 4) + c, c = 0..3; c = 2 i + h is the row 64 i + 16 (t // 32) + 8 h + t % 32 // 4.

So no value is read twice or by a thread that does not multiply it, and the words of a warp lie in 32 different banks.
The interpreter knows no machine instructions; there rows stay in order.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from . import ring
from .compat import pl, plgpu
from .gather import first_scalar
from .layout import DEPTH
from .target import Target

COLUMNS = 128  # of a matrix, that a warpgroup multiplies at a time: rows of its left operand
LINE = ring.transforms(jnp.int8, COLUMNS)

# Words of a stage, `[32 of four columns, DEPTH]`: word t // 4 of the rows 8 k + 2 (t % 4) + v of the weights.
_WORDS = fragments.TiledLayout(
  fragments.Tiling(((32, 8), (8, 8), (2,), (1,))),
  warp_dims=(-6,),
  lane_dims=(-4, -3),
  vector_dim=-1,
)
# Turned products, `[rows, COLUMNS]`: four columns of the rows 8 n + 2 (t % 4) + v.
_TURNED = fragments.TiledLayout(
  fragments.Tiling(((8, 128), (2, 32), (4,))),
  warp_dims=(-4,),
  lane_dims=(-2, -5),
  vector_dim=-1,
)

# Of the words $1 and $2, the bytes `byte` as a pair of 16 bits. A signed byte is what is left of 128 or 256 (bfloat16
# keeps seven bits of it beside the leading one), or of 1024 + 128.
_PAIRS = {
  ('int8', 'bfloat16'): """
    .reg .b32 pair, low, high;
    prmt.b32 pair, $1, $2, 0x{both};
    and.b32 low, pair, 0x007f007f;
    or.b32 low, low, 0x43004300;
    and.b32 high, pair, 0x00800080;
    or.b32 high, high, 0x43004300;
    sub.rn.bf16x2 $0, low, high;""",
  ('int8', 'float16'): """
    .reg .b32 pair, base;
    prmt.b32 pair, $1, $2, 0x{both};
    and.b32 pair, pair, 0x00ff00ff;
    xor.b32 pair, pair, 0x64806480;
    mov.b32 base, 0x64806480;
    sub.rn.f16x2 $0, pair, base;""",
  ('float8_e4m3fn', 'bfloat16'): """
    .reg .b32 pair;
    .reg .b16 bytes, low, high;
    .reg .f32 first, second;
    prmt.b32 pair, $1, $2, 0x{beside};
    cvt.u16.u32 bytes, pair;
    cvt.rn.f16x2.e4m3x2 pair, bytes;
    mov.b32 {{low, high}}, pair;
    cvt.f32.f16 first, low;
    cvt.f32.f16 second, high;
    cvt.rn.bf16x2.f32 $0, second, first;""",
  ('float8_e4m3fn', 'float16'): """
    .reg .b32 pair;
    .reg .b16 bytes;
    prmt.b32 pair, $1, $2, 0x{beside};
    cvt.u16.u32 bytes, pair;
    cvt.rn.f16x2.e4m3x2 $0, bytes;""",
}


def scratch(target: Target, dtype) -> dict:
  """What operands need beside the stages: nothing on hardware, where they are registers."""
  if target.inline:
    return {}
  return {'widened': ring.stages((ring.CONSUMERS, COLUMNS, DEPTH), dtype)}


def operand(target: Target, stage, kind: str, dtype, widened, wg):
  """The left operand `[COLUMNS, DEPTH]` of type `dtype` from `stage [DEPTH, COLUMNS]` in shared memory.

  Args:
    target: hardware, or its simulation.
    stage: int8.
    kind: what its bytes are, 'int8' or 'float8_e4m3fn'.
    dtype: bfloat16 or float16.
    widened: the scratch of that name, since the interpreter of jax 0.10.2 knows no operands in registers.
    wg: index of the warpgroup.
  """
  if target.inline:
    out = plgpu.ShapeDtypeStruct((COLUMNS, DEPTH), dtype, layout=plgpu.Layout.WGMMA)
    emit = lambda ctx, stage: _operand(stage, _PAIRS[kind, jnp.dtype(dtype).name], dtype)
    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(LINE),), return_type=out)(emit)(stage)
  values = stage[...]
  if kind != 'int8':
    values = jax.lax.bitcast_convert_type(values, kind)
  widened[wg] = values.astype(dtype).T
  plgpu.commit_smem()
  return widened.at[wg]


def store(target: Target, acc, scale, expert, column, chunk):
  """`chunk [rows, COLUMNS] = acc.T * scale[expert, column:]`: products `[COLUMNS, rows]` of `operand`."""
  if not target.inline:
    chunk[...] = (acc.T * scale[expert, pl.ds(column, COLUMNS)][None, :]).astype(chunk.dtype)
    return
  kinds = (
    plgpu.Layout.WGMMA,
    plgpu.RefType(),
    plgpu.RefType(ring.transforms(chunk.dtype)),
    *[plgpu.Layout.WG_SPLAT] * 2,
  )
  plgpu.inline_mgpu(arg_types=kinds)(_store)(acc, scale, chunk, expert, column)


def _operand(stage, text, dtype):
  words = _load_words(stage).registers
  layout = fragments.WGMMA_LAYOUT
  pair = ir.VectorType.get((2,), utils.dtype_to_ir_type(jnp.dtype(dtype)))
  registers = np.empty(layout.registers_shape((COLUMNS, DEPTH)), dtype=object)
  for where in np.ndindex(registers.shape):
    half, depth, _, _, eight = where[:5]
    byte = 2 * half + eight
    both = (words[0, depth, 0, 0, 0, 0, v, 0] for v in range(2))
    registers[where] = utils.bitcast(_widen(text, byte, *both), pair)
  return fragments.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _load_words(stage):
  """The stage's bytes, four columns a word."""
  high, wide, lines, width = ir.MemRefType(stage.type).shape
  assert (wide, width) == (1, COLUMNS)
  i32 = ir.IntegerType.get_signless(32)
  kind = ir.MemRefType.get(
    (high, wide, lines, width // 4), i32, memory_space=ir.MemRefType(stage.type).memory_space
  )
  words = utils.ptr_as_memref(utils.memref_ptr(stage), kind)
  words = utils.memref_transpose(words, (1, 0, 3, 2))
  load = fragments.FragmentedArray.load_tiled
  return load(words, swizzle=128, is_signed=False, layout=_WORDS)


def _widen(text, byte, first, second):
  i32 = ir.IntegerType.get_signless(32)
  text = text.format(both=f'{byte:x}{4 + byte:x}{byte:x}{byte:x}', beside=f'00{4 + byte:x}{byte:x}')
  words = [utils.bitcast(word, i32) for word in (first, second)]
  return llvm.inline_asm(i32, words, f'{{{text} }}', '=r,r,r')


def _store(ctx, acc, scale, chunk, expert, column):
  del ctx
  f32, i32, i64 = ir.F32Type.get(), ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
  const = lambda value: utils.c(value, i32)
  width = ir.MemRefType(scale.type).shape[1]
  thread = arith.remui(utils.thread_idx(), const(128))
  first = arith.addi(first_scalar(column), arith.andi(thread, const(124)))
  offset = arith.addi(arith.muli(first_scalar(expert), const(width)), first)
  base = utils.memref_ptr(scale)
  place = utils.getelementptr(base, [arith.extui(i64, offset)], f32)
  four = ir.VectorType.get((4,), f32)
  factors = llvm.load(four, place)

  kind = ir.MemRefType(chunk.type)
  num_rows = kind.shape[0] * kind.shape[2]
  narrow = ir.VectorType.get((4,), kind.element_type)
  registers = np.empty(_TURNED.registers_shape((num_rows, COLUMNS)), dtype=object)
  for where in np.ndindex(registers.shape):
    row, v = where[0], where[4]
    values = utils.vector_concat(
      [
        utils.vector_slice(acc.registers[half, row, 0, 0, eight, 0, 0, 0, 0], slice(v, v + 1))
        for half in range(2)
        for eight in range(2)
      ]
    )
    registers[where] = arith.truncf(narrow, arith.mulf(values, factors))
  turned = fragments.FragmentedArray(_registers=registers, _layout=_TURNED, _is_signed=None)
  turned.store_tiled(chunk, swizzle=128)
