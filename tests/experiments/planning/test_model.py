"""The analytic model against counts by hand, and what it says of machines that are too small."""

import dataclasses
import math

import pytest

from configs import common
from configs.scale import kimi_1t, olmoe_1b_7b
from experiments.errors import BadInput
from experiments.planning import rows
from experiments.planning.chips import CHIPS, Level, Topology, parse_topology
from experiments.planning.exchanges import room
from experiments.planning.memory import memory
from experiments.planning.moves import Move, by_kind
from experiments.planning.roofline import products, seconds, times
from experiments.planning.search import meshes, own_layout, plan_of, search
from experiments.planning.tensors import tensors
from experiments.planning.traffic import moves
from experiments.planning.workload import EXCHANGES, Layout, workload
from experiments.settings import Settings

AXES = {'data': 1, 'fsdp': 1, 'expert': 1}
D, F, E, L, V, S = 64, 32, 8, 2, 512, 128


def small(**changes):
  """Two mixtures of eight experts, two of them a token's; 16 sequences of 128."""
  config = common.get_config()
  config.batch_size, config.data.sequence_length = 16, S
  config.model.update(
    dict(d_model=D, d_ff=F, num_layers=L, num_heads=2, vocab_size=V, remat='full', qk_norm=False)
  )
  config.model.tie_embeddings = False
  config.update_from_flattened_dict(changes)
  return Settings.from_config(config)


def of(settings, exchange='all_gather', microbatches=1, **sizes):
  return workload(settings, 'tpu'), Layout(AXES | sizes, exchange, microbatches)


EXPERTS = L * E * 3 * D * F
ATTENTION = L * 4 * D * D
NORMS = (2 * L + 1) * D
ROUTERS = L * D * E


def test_state_is_twelve_bytes_a_parameter_over_its_shards():
  found = memory(*of(small(), fsdp=2, expert=4))
  cut = EXPERTS / 8 + (ATTENTION + 2 * V * D) / 2 + NORMS + ROUTERS
  assert found['parameters'] == 4 * cut
  assert found['optimizer'] == 8 * cut


def test_groups_of_tensors_are_told_by_their_paths():
  sizes = {}
  for tensor in tensors(small()):
    sizes[tensor.group] = sizes.get(tensor.group, 0) + tensor.size
  assert sizes == {
    'embedding': V * D,
    'head': V * D,
    'dense': ATTENTION + NORMS,
    'experts': EXPERTS,
    'router': ROUTERS,
  }


def test_what_a_device_sends_is_counted_by_hand():
  """One microbatch: weights are gathered for the layer, its recomputation and its gradients; experts once less."""
  work, layout = of(small(), fsdp=4, expert=2)
  tokens = 16 * S // 8
  sent = by_kind(moves(work, layout))
  gathered = 2 * (3 * ATTENTION + 2 * EXPERTS / 2 + V * D)
  assert sent['all-gather', ('fsdp',)] == gathered * 3 / 4
  reduced = 2 * (ATTENTION + EXPERTS / 2) + 4 * V * D
  assert sent['reduce-scatter', ('fsdp',)] == reduced * 3 / 4
  assert sent['reduce-scatter', ('expert',)] == L * (2 * tokens * D * 2 + tokens * 2 * 4)
  assert sent['all-gather', ('expert',)] == L * (3 * tokens * D * 2 + 2 * 2 * tokens * 2 * 4)
  everywhere = 4 * (V * D + NORMS / 2 + ROUTERS)
  assert sent['all-reduce', ('fsdp', 'expert')] == pytest.approx(2 * 7 / 8 * everywhere, rel=0.01)


def test_microbatches_gather_the_weights_for_each_and_once_more():
  one = by_kind(moves(*of(small(), fsdp=8)))['all-gather', ('fsdp',)]
  work, layout = of(small(), microbatches=2, fsdp=8)
  sent = by_kind(moves(work, layout))
  two = sent['all-gather', ('fsdp',)]
  again = 2 * 2 * (4 * ATTENTION + 3 * EXPERTS + 2 * V * D)
  assert two == again * 7 / 8
  assert two > 2 * one
  # nothing else shares the batch: tokens go to the devices that hold their part of the table
  assert sent['all-to-all', ('fsdp',)] == 2 * (TOKENS // 2) * D * 4 * 7 / 8


def test_the_gradient_of_the_embedding_is_a_table_or_the_tokens_whichever_is_smaller():
  """A table of 1,536 rows; 2,048 tokens, or 1,024 in each of two microbatches."""
  rows = 1536
  work, one = of(small(**{'model.vocab_size': rows}), fsdp=4, expert=2)
  (table,) = (m for m in moves(work, one) if m.what == 'embedding')
  assert (table.kind, table.size, table.whole) == ('all-reduce', 8, rows * D * 4)
  two = dataclasses.replace(one, microbatches=2)
  tokens, shard = (m for m in moves(work, two) if m.what == 'embedding')
  assert (tokens.kind, tokens.size, tokens.whole) == ('all-gather', 8, 2 * 1024 * D * 4)
  assert (shard.kind, shard.axes, shard.whole) == ('all-reduce', ('expert',), rows * D * 4 / 4)


def test_on_many_shards_sums_of_experts_and_head_are_not_scattered():
  few = {(m.kind, m.what) for m in moves(*of(small(), fsdp=4))}
  many = {(m.kind, m.what) for m in moves(*of(small(), fsdp=8))}
  assert {('reduce-scatter', 'experts'), ('reduce-scatter', 'head')} <= few
  assert {('all-reduce', 'experts'), ('all-reduce', 'head'), ('reduce-scatter', 'dense')} <= many


def test_experts_that_data_shards_share_are_scattered_and_then_summed_over_data():
  found = [move for move in moves(*of(small(), fsdp=2, data=2, expert=2)) if move.what == 'experts']
  for kind, axis, whole in (
    ('all-reduce', 'data', 2 * EXPERTS / 2 / 2),
    ('reduce-scatter', 'fsdp', 2 * EXPERTS / 2),
  ):
    parts = [move for move in found if move.kind == kind]
    assert {(move.axes, move.size) for move in parts} == {((axis,), 2)}
    assert sum(move.whole for move in parts) == whole


TOKENS = 16 * S // 8
"""Of a device, where eight share the batch; each has two experts."""


@pytest.mark.parametrize(
  ('exchange', 'options', 'kind', 'rows', 'number'),
  [
    ('all_to_all', {}, 'all-to-all', 2 * 2 * TOKENS, 4),  # room for twice the mean
    ('all_to_all', {'capacity_factor': 1.25}, 'all-to-all', 1.25 * 2 * TOKENS, 4),
    (
      'all_to_all',
      {'capacity_factor': 0},
      'all-to-all',
      4 * 2 * TOKENS,
      4,
    ),  # for all that there can be
    (
      'ragged_all_to_all',
      {},
      'ragged-all-to-all',
      2 * TOKENS,
      512,
    ),  # what there is; a number fills 128 lanes
    ('ragged_fallback', {}, 'ragged-all-to-all', 2 * TOKENS, 512),  # the same while all find place
    ('ragged_all_to_all', {'buffer_factor': 0.5}, 'ragged-all-to-all', TOKENS, 512),
  ],
)
def test_rows_travel_in_the_room_that_their_exchange_has(exchange, options, kind, rows, number):
  """There and back in the layer, in its recomputation and with gradients; the numbers of experts twice there."""
  changes = {'model.moe.exchange': exchange, 'model.moe.exchange_options': options}
  sent = by_kind(moves(*of(small(**changes), exchange, fsdp=2, expert=4)))
  assert sent[kind, ('expert',)] == L * 3 / 4 * (6 * rows * D * 2 + 2 * rows * number)
  other = of(small(**changes), 'all_gather', fsdp=2, expert=4)
  assert (kind, ('expert',)) not in by_kind(moves(*other))


def test_rows_of_two_levels_travel_between_nodes_and_then_inside_of_theirs():
  """Twelve places of a node for 10 rows, and again for those that have arrived; a byte comes back: was there room?"""
  options = {'nodes': 2, 'capacity_factor': 1.2}
  work, layout = of(small(), fsdp=2, expert=4)
  layout = dataclasses.replace(layout, exchange='bilevel', options=options)
  outer, inner = (
    {move.what: move for move in moves(work, layout) if move.part == part}
    for part in ('outer', 'inner')
  )
  rows = 1.2 * 2 * TOKENS
  for hop, number in ((outer, 5), (inner, 4)):
    assert {(move.kind, move.axes, move.size) for move in hop.values()} == {
      ('all-to-all', ('expert',), 2)
    }
    assert hop['tokens'].whole == pytest.approx(L * 6 * rows * D * 2)
    assert hop['choices'].whole == pytest.approx(L * 2 * rows * number)
  everything = dataclasses.replace(layout, options={'nodes': 2, 'capacity_factor': 0})
  assert room(work, everything) == 4 * 2 * TOKENS


def test_copies_of_hot_experts_are_gathered_and_their_gradients_scattered():
  """Of two experts of each of four devices one: four of eight. Other rows have the room of all."""
  options = {'hot': 1, 'capacity_factor': 1.0}
  work, layout = of(small(), fsdp=2, expert=4)
  layout = dataclasses.replace(layout, exchange='sparse_fsdp', options=options)
  sent = by_kind(moves(work, layout))
  assert sent['all-gather', ('expert',)] == 2 * 2 * EXPERTS / 2 * 3 / 4
  assert sent['reduce-scatter', ('expert',)] == 2 * EXPERTS / 2 * 3 / 4
  rows = 2 * TOKENS
  assert sent['all-to-all', ('expert',)] == L * 3 / 4 * (6 * rows * D * 2 + 2 * rows * 4)
  more = dataclasses.replace(layout, options={'hot': 2, 'capacity_factor': 1.0})
  assert by_kind(moves(work, more))['all-gather', ('expert',)] == 2 * 2 * EXPERTS * 3 / 4
  assert memory(work, more)['buffers'] > memory(work, layout)['buffers']


def test_experts_have_work_and_memory_for_the_room_of_their_exchange():
  work, gather = of(small(), 'all_gather', fsdp=2, expert=4)
  rooms = {
    exchange: room(work, dataclasses.replace(gather, exchange=exchange)) / (2 * TOKENS)
    for exchange in EXCHANGES
  }
  assert rooms == {
    'local': 1,
    'all_gather': 4,
    'all_to_all': 2,
    'bilevel': 2,
    'ragged_all_to_all': 4,
    'ragged_fallback': 1.5,
    'sparse_fsdp': 2,
  }
  swap = dataclasses.replace(gather, exchange='all_to_all')
  assert products(work, swap) < products(work, gather)
  assert memory(work, swap)['buffers'] < memory(work, gather)['buffers']


def test_a_fallback_has_the_work_of_its_first_way_and_the_memory_of_its_second():
  work, gather = of(small(), 'all_gather', fsdp=2, expert=4)
  first = dataclasses.replace(gather, exchange='ragged_all_to_all', options={'buffer_factor': 1.5})
  both = dataclasses.replace(gather, exchange='ragged_fallback')
  assert products(work, both) == products(work, first) < products(work, gather)
  assert moves(work, both) == moves(work, first)
  assert memory(work, both) == memory(work, gather)
  assert memory(work, both)['buffers'] > memory(work, first)['buffers']


def test_what_travels_over_tensor_is_counted_by_hand():
  """Tokens cut by model width are gathered for every layer that reads them whole, and partial sums scattered."""
  work, layout = of(small(), 'local', fsdp=8, tensor=2)
  sent = by_kind(moves(work, layout))
  token = TOKENS * D * 2
  # attention reads in both forward passes and three times in the backward one, experts once; both ends of the model
  assert sent['all-gather', ('tensor',)] == (L * (5 + 3) * token + 3 * token) / 2
  assert sent['reduce-scatter', ('tensor',)] == L * (3 + 2) * token / 2
  assert sent['all-reduce', ('tensor',)] == L * 2 * TOKENS * E * 4  # scores of routers


@pytest.mark.parametrize('windowed', [False, True])
def test_latent_attention_adds_up_latents_over_tensor(monkeypatch, windowed):
  """Both latents and the shared key in both forward passes and the backward one; outputs scattered, or permuted."""
  monkeypatch.setattr(rows, 'WINDOWED', 0 if windowed else 2**40)
  latent = {'q_rank': 12, 'kv_rank': 8, 'rotary_dim': 4, 'value_dim': 8}
  work, layout = of(
    small(**{'model.attention': 'latent', 'model.latent': latent}), 'local', fsdp=8, tensor=2
  )
  found = [move for move in moves(work, layout) if move.axes == ('tensor',)]
  sums = [move.whole for move in found if (move.kind, move.what) == ('all-reduce', 'activations')]
  token = TOKENS * 2
  assert sums == [L * 3 * token * (12 + 8 + 4)]
  permuted = [move.whole for move in found if move.kind == 'collective-permute']
  assert permuted == ([L * 4 * token * D] if windowed else [])
  scattered = sum(move.whole for move in found if move.kind == 'reduce-scatter')
  gathered = sum(move.whole for move in found if move.kind == 'all-gather')
  experts = L * token * D
  assert scattered == (2 + (0 if windowed else 2)) * experts
  assert gathered == (3 + (0 if windowed else 2)) * experts + 3 * token * D


def test_with_experts_and_tensor_the_head_adds_up_logits():
  work, layout = of(small(), 'all_to_all', fsdp=2, expert=4, tensor=2)
  (logits,) = (move for move in moves(work, layout) if move.what == 'logits')
  assert (logits.kind, logits.axes, logits.whole) == ('all-reduce', ('tensor',), TOKENS * V * 4)


def test_on_one_device_nothing_travels_and_the_products_are_the_models():
  work, layout = of(small(**{'model.remat': 'none'}), exchange='local')
  work = dataclasses.replace(work, blocks=False)
  assert moves(work, layout) == []
  assert products(work, layout) == work.flops
  found = times(work, layout, Topology('one', CHIPS['v5p'], (1, 1, 1)))
  assert found.matmul == work.flops / CHIPS['v5p'].peak
  assert found.network == {}


def test_kernels_skip_what_blocks_work_on_in_vain():
  settings = small()
  layout = of(settings, fsdp=2, expert=4)[1]
  blocks, kernels = workload(settings, 'tpu'), workload(settings, 'tpu', kernels=True)
  assert blocks.blocks
  more = products(blocks, layout) - products(kernels, layout)
  # four devices work on the rows of all four, and on half as many of padding
  assert more == pytest.approx(blocks.expert_flops * (1.5 * 4 - 1) * 4 / 3)
  assert memory(kernels, layout)['buffers'] < memory(blocks, layout)['buffers']


def test_recomputation_is_a_pass_forward_more():
  work, layout = of(small(), exchange='local')
  work = dataclasses.replace(work, blocks=False)
  assert products(work, layout) == pytest.approx(work.flops * 4 / 3)
  twice = dataclasses.replace(layout, microbatches=4)
  assert products(work, twice) == pytest.approx(work.flops * 5 / 3)


def test_each_level_of_the_network_carries_what_the_inner_one_left():
  of_axis = {'fsdp': (Level('nvlink', 8, 100.0), Level('network', 4, 10.0))}
  gather = Move('all-gather', ('fsdp',), 32, 'dense', 3200.0)
  assert seconds(gather, of_axis) == pytest.approx(3200 * 7 / 8 / 100 + 400 * 3 / 4 / 10)
  reduce = dataclasses.replace(gather, kind='all-reduce')
  assert seconds(reduce, of_axis) == 2 * seconds(gather, of_axis)
  swap = dataclasses.replace(gather, kind='all-to-all')
  # of 32 parts 7 stay in the node and 24 leave it
  assert seconds(swap, of_axis) == pytest.approx(3200 * 7 / 32 / 100 + 3200 * 24 / 32 / 10)


def test_a_part_of_an_axis_lies_over_a_part_of_the_levels():
  """Two levels between four nodes of eight: what leaves a node is the same, and comes once more inside."""
  of_axis = {'expert': (Level('nvlink', 8, 100.0), Level('network', 4, 10.0))}
  outer = Move('all-to-all', ('expert',), 4, 'tokens', 3200.0, 'outer')
  inner = Move('all-to-all', ('expert',), 8, 'tokens', 3200.0, 'inner')
  assert seconds(outer, of_axis) == pytest.approx(3200 * 3 / 4 / 10)
  assert seconds(inner, of_axis) == pytest.approx(3200 * 7 / 8 / 100)
  # nodes that are not those of the machine: two of them in one, and half of the way leaves it
  wide = dataclasses.replace(outer, size=8)
  assert seconds(wide, of_axis) == pytest.approx(3200 * (1 / 8 / 100 + 2 * 3 / 8 / 10))
  # on a ring of 32 the four are eight links from each other
  ring = {'expert': (Level('ici', 32, 100.0),)}
  assert seconds(outer, ring) == pytest.approx(3200 * 3 / 4 / 100 * 8)
  assert seconds(inner, ring) == pytest.approx(3200 * 7 / 8 / 100 * 2)


def test_two_levels_are_tried_where_the_machine_has_them_and_copies_where_the_config_names_them():
  def tried(name, topology, options=None):
    changes = {'model.moe.exchange': name, 'model.moe.exchange_options': options or {}}
    plans = search(workload(small(**changes), 'gpu'), parse_topology(topology))
    return {(p.layout.exchange, p.layout.options.get('nodes')) for p in plans}

  others = {(name, None) for name in ('local', 'all_gather', 'all_to_all')}
  others |= {(name, None) for name in ('ragged_all_to_all', 'ragged_fallback')}
  assert tried('auto', 'h100:4x2') == others | {('bilevel', 2)}
  assert tried('auto', 'v5p:2x2x2') == others
  assert tried('sparse_fsdp', 'v5p:2x2x2', {'hot': 2}) == others | {('sparse_fsdp', None)}
  assert tried('bilevel', 'v5p:2x2x2', {'nodes': 4}) == others | {('bilevel', None)}


def test_meshes_are_all_ways_to_cut_the_devices():
  found = [
    (mesh['data'], mesh['fsdp'], mesh['expert'])
    for mesh in meshes(12)
    if mesh.get('tensor', 1) == 1
  ]
  assert len(found) == len(set(found)) == 18  # 2^2 over three axes in 6 ways, 3 in 3
  assert all(math.prod(mesh.values()) == 12 for mesh in meshes(12))


def test_the_fastest_layout_comes_first_and_every_one_fits():
  work = workload(Settings.from_config(olmoe_1b_7b.get_config()), 'tpu')
  topology = parse_topology('v5p:2x2x4')
  plans = search(work, topology)
  assert len(plans) > 5
  assert [plan.times.total for plan in plans] == sorted(plan.times.total for plan in plans)
  for plan in plans:
    assert plan.bytes <= topology.chip.memory
    assert plan.times.least <= plan.times.total
    assert 0 < plan.times.mfu < 1
    assert plan_of(work, plan.layout, topology) == plan


def test_a_machine_that_is_too_small_is_told_by_how_much_and_where():
  work = workload(Settings.from_config(kimi_1t.get_config()), 'tpu')
  with pytest.raises(BadInput, match='v5e:4x4 is too small by') as error:
    search(work, parse_topology('v5e:4x4'))
  for group in ('parameters', 'optimizer', 'gradients', 'activations', 'buffers'):
    assert f'{group} ' in str(error.value)
  assert '\n' not in str(error.value)


def test_a_batch_that_divides_over_no_mesh_is_refused():
  with pytest.raises(BadInput, match='batch_size=16 divides over no mesh of the 64 devices'):
    search(workload(small(), 'tpu'), parse_topology('v5p:4x4x4'))


def test_the_configs_own_mesh_is_checked():
  settings = small(**{'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': -1})
  found = own_layout(settings, 8)
  assert {axis: size for axis, size in found.sizes.items() if size > 1} == {'fsdp': 2, 'expert': 4}
  assert (found.exchange, found.microbatches) == ('all_gather', 1)
  # experts choose among all tokens of the batch: 'auto' gathers them, as the training program does
  leave = small(
    **{'model.moe.router': {'name': 'expert_choice', 'capacity_factor': 2.0, 'group': 'batch'}}
  )
  assert own_layout(leave, 8).exchange == 'all_gather'
  assert own_layout(small(), 8).exchange == 'local'
  wrong = small(
    **{'model.moe.exchange': 'all_to_all', 'model.moe.exchange_options': {'buffer_factor': 2}}
  )
  with pytest.raises(BadInput, match="exchange='all_to_all' has no option 'buffer_factor'"):
    own_layout(wrong, 1)
  for name, options, message in (
    ('bilevel', {'nodes': 3}, 'nodes=3 does not divide mesh axis expert=4'),
    ('sparse_fsdp', {'hot': 3}, 'hot=3: accepted are 1 to 2, the experts of a device'),
    ('sparse_fsdp', {'hot': 0}, 'hot=0: accepted are integers from 1'),
  ):
    changes = {'model.moe.exchange': name, 'model.moe.exchange_options': options}
    with pytest.raises(BadInput, match=message):
      own_layout(small(**{'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 4, **changes}), 8)
  with pytest.raises(BadInput, match='mesh data=1 fsdp=2 expert=-1.* does not fit 7 devices'):
    own_layout(settings, 7)
  work, topology = workload(settings, 'tpu'), parse_topology('v5p:4x4x4')
  with pytest.raises(BadInput, match='does not divide over the 64 shards'):
    plan_of(work, Layout(AXES | {'fsdp': 64}, 'local', 1), topology)
  with pytest.raises(BadInput, match='2 heads of keys do not divide over mesh axis tensor=4'):
    plan_of(work, Layout(AXES | {'fsdp': 16, 'tensor': 4}, 'local', 1), topology)


def test_images_are_not_planned_for():
  config = common.get_config()
  config.model.kind, config.data.objective, config.data.name = 'vit', 'classify', 'mnist5k'
  with pytest.raises(BadInput, match="model.kind='vit' is not planned for"):
    workload(Settings.from_config(config), 'tpu')
