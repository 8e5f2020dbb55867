"""Layers that are not alike: pyramids, whose mixtures grow, and blocks that tokens skip."""

import dataclasses

import jax
import pytest

from experiments.errors import BadInput
from experiments.flops import training_flops
from experiments.make_model import model_maker
from experiments.planning.chips import parse_topology
from experiments.planning.exchanges import worked_on
from experiments.planning.memory import attention, experts, layer, memory
from experiments.planning.moves import by_kind
from experiments.planning.report import notes
from experiments.planning.roofline import memory_bytes, products
from experiments.planning.search import own_layout, plan_of, search
from experiments.planning.tensors import data_shape
from experiments.planning.traffic import moves
from experiments.planning.workload import Layout, workload
from experiments.state import ModelDef
from moejax.mesh.make import make_mesh
from moejax.transformer import count_params
from tests.experiments.planning.test_model import AXES, TOKENS, D, F, S, V, small

PYRAMID = {'model.num_layers': 3, 'model.moe.pyramid': '4,4,8'}
SKIPPED = {
  'model.num_layers': 4,
  'model.depth.layers': 'every_2',
  'model.depth.capacity': 0.3,
  'allow_leak': True,
}
HEADS = {'model.attention': 'experts', 'model.qk_norm': False}
THROUGH = 39
"""Tokens of 128 that are a part of 0.3, rounded up."""


def of(changes, exchange='all_gather', microbatches=1, **sizes):
  return workload(small(**changes), 'tpu'), Layout(AXES | sizes, exchange, microbatches)


def counts(settings):
  """Parameters of the real model, by part."""
  mesh = make_mesh(devices=jax.devices()[:1])
  definition = ModelDef(model_maker(settings, data_shape(settings), mesh))
  return count_params(jax.eval_shape(definition.init, jax.random.key(0))[0])


@pytest.mark.parametrize('changes', [PYRAMID, SKIPPED, HEADS])
def test_parameters_are_those_of_the_model(changes):
  work, _ = of(changes)
  real, found = counts(work.settings), {}
  for tensor in work.tensors:
    found[tensor.group] = found.get(tensor.group, 0) + tensor.size
  assert sum(found.values()) == real['total']
  assert found['experts'] == real['moe/experts']
  others = real.get('depth/router', 0) + real.get('attention/router', 0)
  assert found['router'] == real['moe/router'] + others
  assert found.get('heads', 0) == real.get('attention/experts', 0)


def test_a_pyramid_is_as_large_as_its_layers_and_works_with_its_largest_at_once():
  """Two layers of four experts and one of eight, in the memory of a device a quarter of each."""
  work, layout = of(PYRAMID, fsdp=2, expert=4)
  expert = 3 * D * F
  assert work.mixtures == [(1.0, 4), (1.0, 4), (1.0, 8)]
  held = memory(work, layout)
  rest = counts(work.settings)['total'] - 16 * expert
  replicated = 7 * D + 16 * D  # norms and routers
  assert held['parameters'] == 4 * (16 * expert / 8 + (rest - replicated) / 2 + replicated)
  sent = by_kind(moves(work, layout))
  gathered = 2 * (3 * 3 * 4 * D * D + 2 * 16 * expert / 4 + V * D)
  assert sent['all-gather', ('fsdp',)] == gathered / 2
  # eight experts in the largest layer, as in every one of the other model
  flat, _ = of({'model.num_layers': 3})
  assert layer(work, layout) == layer(flat, layout)
  assert [rows.experts for rows in worked_on(work, layout, 4)] == [1]
  assert memory_bytes(work, layout) < memory_bytes(flat, layout)
  assert work.expert_flops == flat.expert_flops
  assert work.flops == flat.flops - 3 * 16 * S * 2 * D * (4 + 4)  # routers of four less


def test_experts_of_a_pyramid_divide_over_the_mesh_in_every_layer():
  work, _ = of(PYRAMID)
  found = search(work, parse_topology('v5p:2x2x4'))
  assert {plan.layout.expert for plan in found} == {1, 2, 4}
  hot = {'model.moe.exchange': 'sparse_fsdp', 'model.moe.exchange_options': {'hot': 2}}
  with pytest.raises(BadInput, match='hot=2: accepted are 1 to 1, the experts of a device'):
    own_layout(small(**PYRAMID, **hot, **{'mesh.data': 1, 'mesh.fsdp': 2, 'mesh.expert': 4}), 8)


def test_tokens_that_skip_a_block_neither_work_nor_travel_there():
  """Of four layers two have 39 of 128 tokens, which see each other alone."""
  work, layout = of(SKIPPED, 'all_to_all', fsdp=2, expert=4)
  part = THROUGH / S
  assert work.shares == (1.0, part, 1.0, part)
  layers = 2 + 2 * part
  rows = 2 * 2 * TOKENS
  sent = by_kind(moves(work, layout))
  assert sent['all-to-all', ('expert',)] == pytest.approx(
    layers * 3 / 4 * (6 * rows * D * 2 + 2 * rows * 4)
  )
  whole, _ = of({'model.num_layers': 4})
  assert work.expert_flops == pytest.approx(whole.expert_flops * layers / 4)
  # attention of a block: projections of 39 tokens, and scores of as many keys
  less = 2 * ((S - THROUGH) * 2 * 4 * D * D + (S**2 - THROUGH**2) * 2 * 2 * D)
  less += 2 * (S - THROUGH) * 2 * (D * 8 + 2 * 3 * D * F)
  more = 2 * S * 2 * (D + (D + 1) * D // 4)
  assert work.flops == pytest.approx(whole.flops - 3 * 16 * (less - more))
  assert work.flops == training_flops(work.settings, data_shape(work.settings))
  assert products(work, layout) < products(whole, layout)
  assert memory_bytes(work, layout) < memory_bytes(whole, layout)


def test_a_stack_of_skipped_blocks_needs_less_memory_at_once_and_one_that_is_not_as_much():
  work, layout = of(SKIPPED, 'all_to_all', fsdp=2, expert=4)
  part = THROUGH / S
  assert attention(work, layout, part) < part * attention(work, layout)
  assert experts(work, layout, part, 8) < experts(work, layout)
  every, _ = of(SKIPPED | {'model.depth.layers': 'all'})
  whole, _ = of({'model.num_layers': 4})
  assert layer(every, layout) < layer(work, layout)
  # what the backward pass starts from are the inputs of all layers, whole
  assert memory(work, layout)['activations'] == memory(whole, layout)['activations']
  beside = dataclasses.replace(layout, sizes=layout.sizes | {'tensor': 2})
  assert len(notes(work, beside)) == 1 + len(notes(work, layout))
  assert 'blocks that tokens skip' in notes(work, beside)[-1]


def test_rows_of_heads_that_are_experts_stay_and_their_matrices_come():
  """Two of eight heads are a token's, and so are two rows; of SwitchHead two for the values of each of two heads."""
  work, layout = of(HEADS, 'local', fsdp=4)
  grouped, _ = of({})
  assert (work.query_heads, work.head_rows) == (2, 2)
  switch, _ = of(HEADS | {'model.attention': 'switch_head'})
  assert (switch.query_heads, switch.head_rows) == (2, 4)
  assert (grouped.query_heads, grouped.head_rows) == (2, 0)
  width = D // 2
  found = {(m.kind, m.what): m.whole for m in moves(work, layout)}
  matrices = 2 * 2 * 8 * D * width  # of two layers two each
  assert found['all-gather', 'heads'] == 2 * 2 * matrices
  assert found['reduce-scatter', 'heads'] == 2 * matrices
  assert (
    found['reduce-scatter', 'dense'] == 2 * 2 * 2 * D * width
  )  # one head of keys, one of values
  assert not {m.what for m in moves(work, layout)} & {'tokens', 'choices'}
  assert attention(work, layout) > attention(grouped, layout)
  kernels = workload(work.settings, 'tpu', kernels=True)
  more = products(work, layout) - products(kernels, layout)
  padding = 0.5 * (work.expert_flops + 3 * 16 * S * 2 * 2 * 2 * 2 * D * width)
  assert more == pytest.approx(padding * 4 / 3)


def test_heads_that_are_experts_are_not_planned_for_over_tensor():
  work, layout = of(HEADS, 'local', fsdp=4, tensor=2)
  topology = parse_topology('v5p:2x2x2')
  assert {plan.layout.tensor for plan in search(work, topology)} == {1}
  with pytest.raises(BadInput, match="model.attention='experts' over mesh axis tensor=2"):
    plan_of(work, layout, topology)
