"""Bytes between devices: counted in compiled programs, and against what the shapes say."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh.traffic import axes_of, collective_bytes, collectives

ROWS, WIDTH = 64, 4
BYTES = ROWS * WIDTH * 4 // 8  # of a device's part, in float32


def compiled(mesh, body, *, after=lambda y: y):
  """`body` of each device's rows, and `after` of the global result."""
  rows = P(mesh.axis_names)
  run = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows)
  x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, rows))
  return jax.jit(lambda x: after(run(x))).lower(x).compile()


def gather_and_scatter(x, axis):
  return jax.lax.psum_scatter(jax.lax.all_gather(x, axis, tiled=True), axis, tiled=True)


def test_what_a_device_sends_is_what_the_shapes_say(make_mesh):
  mesh = make_mesh(data=2, expert=4)

  def body(x):
    x = gather_and_scatter(x, 'expert')
    x = jax.lax.all_to_all(x, 'expert', 0, 0, tiled=True)
    return jax.lax.ppermute(x, 'data', [(0, 1), (1, 0)]) + jax.lax.psum(x, 'data')

  want = {
    ('all-gather', ('expert',)): 3 * BYTES,
    ('reduce-scatter', ('expert',)): 3 * BYTES,
    ('all-to-all', ('expert',)): 0.75 * BYTES,
    ('collective-permute', ('data',)): BYTES,
    ('all-reduce', ('data',)): BYTES,
  }
  program = compiled(mesh, body)
  assert collective_bytes(program, mesh) == want
  assert sum(one.sent for one in collectives(program, 8)) == sum(want.values())


def test_a_loop_counts_as_often_as_it_runs_and_a_branch_is_told(make_mesh):
  mesh = make_mesh(expert=8)
  send = functools.partial(
    jax.lax.all_to_all, axis_name='expert', split_axis=0, concat_axis=0, tiled=True
  )

  def body(x):
    x = jax.lax.scan(lambda x, _: (send(x) * 2, None), x, None, length=5)[0]
    return jax.lax.cond(
      jax.lax.psum(x.sum(), 'expert') > 0, lambda x: gather_and_scatter(x, 'expert'), lambda x: x, x
    )

  found = collectives(compiled(mesh, body), 8)
  runs = {one.kind: (one.times, one.conditional) for one in found}
  assert runs['all-to-all'] == (5, False)
  assert runs['all-gather'] == runs['reduce-scatter'] == (1, True)
  assert runs['all-reduce'] == (1, False)


@pytest.mark.parametrize(
  ('text', 'axes', 'size'),
  [
    ('{{0,1},{2,3},{4,5},{6,7}}', ('expert',), 2),
    ('[4,2]<=[8]', ('expert',), 2),
    ('[2,4]<=[2,2,2]T(1,0,2)', ('data', 'expert'), 4),
    ("mesh['a'=4,'b'=2] {'a'}", ('data', 'fsdp'), 4),
    ("mesh['a'=8] {'a':(1)2}", ('data',), 2),
    ("mesh['a'=8] {'a':(2)2}", ('fsdp',), 2),
    ("mesh['a'=8] {'a':(2)4}", ('fsdp', 'expert'), 4),
    ('{}', ('data', 'fsdp', 'expert'), 8),
  ],
)
def test_every_spelling_of_groups_is_understood(text, axes, size, make_mesh):
  """The same line with other groups, on a mesh of 2 x 2 x 2."""
  line = f'  %y = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%add'
  module = 'HloModule m\n\nENTRY %main (x: f32[16]) -> f32[16] {\n  %x = f32[16]{0} parameter(0)\n'
  (one,) = collectives(f'{module}{line}\n}}\n', 8)
  assert axes_of(one, make_mesh(data=2, fsdp=2, expert=2)) == axes
  assert one.sent == 2 * 64 * (size - 1) / size
  assert sorted(place for group in one.groups for place in group) == list(range(8))


def test_asynchronous_operations_count_once(make_mesh):
  """As on accelerators: a start and a done, and a gather wrapped in a computation of its own."""
  module = """HloModule m

%wrapped (p: bf16[8,128]) -> bf16[64,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[64,128]{1,0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (x: bf16[8,128]) -> bf16[64,128] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %s = (bf16[8,128]{1,0:T(8,128)}, bf16[64,128]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %d = bf16[64,128]{1,0} all-gather-done(%s)
  %a = ((bf16[8,128]{1,0}), bf16[64,128]{1,0}, u32[]) async-start(%x), calls=%wrapped
  ROOT %b = bf16[64,128]{1,0} async-done(%a), calls=%wrapped
}
"""
  found = collectives(module, 8)
  assert [(one.kind, one.operand) for one in found] == [('all-gather', 8 * 128 * 2)] * 2
  assert sum(one.sent for one in found) == 2 * 7 * 8 * 128 * 2


def test_a_collective_that_runs_beside_several_fusions_counts_once():
  """As v5e does it: started in one fusion, continued in another with work of its own, done in a third."""
  gather = 'all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}'
  computations = '\n'.join(
    f'%{name} (p: f32[8]) -> f32[64] {{\n  %p = f32[8]{{0}} parameter(0)\n  ROOT %g{i} = f32[64]{{0}} {gather}\n}}\n'
    for i, name in enumerate(('started', 'async_collective_fusion.3', 'ended'))
  )
  module = f"""HloModule m

{computations}
%uses (p: f32[64]) -> f32[64] {{
  %p = f32[64]{{0}} parameter(0)
  ROOT %r = f32[64]{{0}} all-reduce(%p), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
}}

ENTRY %main (x: f32[8]) -> f32[64] {{
  %x = f32[8]{{0}} parameter(0)
  %async-collective-start.2 = f32[64]{{0}} fusion(%x), kind=kCustom, calls=%started
  %fusion.3 = f32[64]{{0}} fusion(%async-collective-start.2), kind=kOutput, calls=%async_collective_fusion.3
  %async-collective-done.2 = f32[64]{{0}} fusion(%fusion.3), kind=kCustom, calls=%ended
  ROOT %y = f32[64]{{0}} fusion(%async-collective-done.2), kind=kLoop, calls=%uses
}}
"""
  assert sorted(one.kind for one in collectives(module, 8)) == ['all-gather', 'all-reduce']


def test_a_ragged_exchange_sends_no_more_than_it_has_or_than_the_target_takes():
  """Where rows come back from a buffer for the worst case, 64 of them, there is room for 16 alone."""
  line = '  ROOT %y = f32[16] ragged-all-to-all(%x, %out, %a, %b, %c, %d), channel_id=1, replica_groups={{0,1,2,3}}'
  module = f"""HloModule m

ENTRY %main (x: f32[64], out: f32[16]) -> f32[16] {{
  %x = f32[64]{{0}} parameter(0)
  %out = f32[16]{{0}} parameter(1)
{line}
}}
"""
  (one,) = collectives(module, 4)
  assert (one.operand, one.sent) == (64, 64 * 3 / 4)


TPU_LOOP = """HloModule jit_f, num_partitions=4

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(61)
  %p = (s32[]{:T(128)}, f32[8]{0:T(8)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%counter, %constant.3), direction=LT
}

%body (p.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(8)}) parameter(0)
  %x = f32[8]{0:T(8)} get-tuple-element(%p.1), index=1
  %sum = f32[8]{0:T(8)} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %start = (s32[]{:T(128)}, f32[8]{0:T(8)}) tuple()
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0:T(8)}) while(%start), condition=%condition, body=%body
}
"""


def test_a_loop_without_annotation_runs_as_often_as_its_counter_is_compared_with():
  """TPU programs say the length of a loop nowhere else."""
  (one,) = collectives(TPU_LOOP, 4)
  assert (one.kind, one.times) == ('all-reduce', 61)
  (unknown,) = collectives(TPU_LOOP.replace('direction=LT', 'direction=NE'), 4)
  assert unknown.times == 1
