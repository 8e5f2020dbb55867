"""The analytic model against the compiled step: for TPUs where libtpu is installed, for emulated devices always."""

import dataclasses
import importlib.util

import jax
import pytest

from configs import common
from experiments.errors import BadInput
from experiments.plan import OVER, STATE_ERROR, TRAFFIC_ERROR, UNDER, PredictionMissed, check
from experiments.planning import compiled as module
from experiments.planning.chips import CHIPS, Topology, parse_topology
from experiments.planning.compiled import (
  LIVES,
  Compiled,
  compare,
  compile_step,
  described_devices,
  expected_by_size,
  laid_out,
  lower,
  scattered,
)
from experiments.planning.memory import memory
from experiments.planning.traffic import moves
from experiments.planning.workload import Layout, workload
from experiments.settings import Settings
from moejax.mesh.make import make_mesh
from moejax.mesh.traffic import collectives
from tests.compilers import libtpu
from tests.thorough import thorough

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason="libtpu is not installed: the extra 'tpu' has it",
)


def settings(**changes):
  """Two mixtures of 16 experts; sizes that tiles of the hardware divide."""
  config = common.get_config()
  config.batch_size, config.data.sequence_length = 16, 256
  config.model.update(
    dict(d_model=512, d_ff=256, num_layers=4, num_heads=4, vocab_size=2048, remat='full')
  )
  config.model.tie_embeddings = False
  config.model.moe.num_experts = 16
  config.update_from_flattened_dict(changes)
  return Settings.from_config(config)


@pytest.mark.aot
@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(('microbatches', 'error'), [(1, 0.025), (4, 0.001)])
def test_a_step_compiled_for_tpus_holds_the_predicted_collectives(microbatches, error):
  """4,096 tokens are more than the rows of the table, the 1,024 of a microbatch fewer: its gradient travels otherwise.

  What is left of one microbatch is the table, 1 MiB in bfloat16, gathered once to look the tokens up in. Then devices
  that share a half of it add its gradients, once a step; from libtpu 0.0.50 on in each microbatch: 2 MiB in float32, of
  which a device sends half.
  """
  topology = parse_topology('v5p:2x2x1')
  work = workload(settings(), 'tpu')
  layout = Layout({'data': 1, 'fsdp': 2, 'expert': 2}, 'all_gather', microbatches)
  with jax.numpy_dtype_promotion('standard'):  # optax
    found = compile_step(work.settings, layout, topology)
  rows = {one.what: one for one in compare(work, layout, found)}
  assert abs(rows.pop('state').error) < STATE_ERROR
  del rows[LIVES]  # of a model so small that padding rules
  assert {'all-gather over expert, fsdp', 'sums over expert, fsdp'} <= set(rows)
  added = (microbatches - 1) * 2**20 if libtpu() >= (0, 0, 50) else 0
  sums = rows['sums over expert, fsdp']
  rows[sums.what] = dataclasses.replace(sums, predicted=sums.predicted + added)
  for one in rows.values():
    assert abs(one.error) < error < TRAFFIC_ERROR, one
  assert abs(sums.error) < TRAFFIC_ERROR


@pytest.mark.aot
@pytest.mark.slow
@needs_libtpu
def test_a_training_step_is_compiled_on_kernels_asked_for_by_name():
  """The TPU's, in a step on four devices; what is made for other chips, or not for the type, is one sentence."""
  topology = parse_topology('v5p:2x2x1')
  layout = Layout({'data': 1, 'fsdp': 2, 'expert': 2}, 'all_gather', 1)
  small = {'model.num_layers': 1, 'model.dtype': 'bfloat16'}
  of = lambda name: settings(**small, **{'model.moe.implementation': name})
  with jax.numpy_dtype_promotion('standard'):  # optax
    assert compile_step(of('tpu'), layout, topology).peak > 0
    mesh = make_mesh(1, 2, 2, devices=described_devices(topology))
    text = lower(laid_out(of('tpu'), layout), mesh).as_text()
  assert 'kernel_name = "expert_ffn_up"' in text and 'kernel_name = "expert_ffn_ddown"' in text
  with pytest.raises(BadInput, match="^model.moe.implementation='gpu': .* needs an NVIDIA GPU"):
    compile_step(of('gpu'), layout, topology)


@pytest.mark.aot
@needs_libtpu
def test_a_topology_that_libtpu_does_not_know_is_one_sentence():
  with pytest.raises(BadInput, match='libtpu has no such topology'):
    described_devices(Topology('v5p:3x5x7', CHIPS['v5p'], (3, 5, 7)))


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize('name', ['v4:2x2x2', 'v5e:4x4', 'v5p:16x16x16', 'v6e:4x4', '7x:2x2x2'])
def test_a_mesh_of_a_described_pod_has_all_devices_and_may_cut_a_dimension(name):
  topology = parse_topology(name)
  devices = described_devices(topology)
  assert len(devices) == topology.devices
  assert make_mesh(1, -1, 8, devices=devices).size == topology.devices


def test_without_libtpu_the_extra_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(BadInput, match="install the extra 'tpu'"):
    described_devices(parse_topology('v5p:2x2x1'))


def test_gpus_are_not_compiled_for():
  with pytest.raises(BadInput, match='only TPUs can'):
    described_devices(parse_topology('h100:8x2'))


def compiled_here(exchange, fsdp, expert, changes=None, **options):
  """A step compiled for eight devices of this machine: the exchange is the same, the rest of XLA's choices are not."""
  work = workload(settings(**{'model.num_layers': 2, **(changes or {})}), 'cpu')
  layout = Layout({'data': 1, 'fsdp': fsdp, 'expert': expert}, exchange, 1, options)
  run = module.laid_out(work.settings, layout)
  mesh = make_mesh(1, fsdp, expert, devices=jax.devices())
  with jax.numpy_dtype_promotion('standard'):  # optax
    return work, layout, lower(run, mesh).compile()


@pytest.fixture(scope='module')
def emulated():
  return compiled_here('all_gather', 4, 2)


def exchanged(work, layout, program):
  """(kind, devices) -> bytes of the exchange, in the program and predicted; sums over other axes left out.

  Float32 here: twice the bytes. The exchange is recognised by the operations that it was made from.
  """
  wide = dataclasses.replace(work, width=4)
  sent, predicted = {}, {}
  for one in collectives(program, 8):
    name = one.source.rpartition('/')[2]
    if 'shard_map' in one.source and name in (
      'all_gather',
      'reduce_scatter',
      'psum_scatter',
      'all_to_all',
    ):
      key = (one.kind, max(map(len, one.groups)))
      sent[key] = sent.get(key, 0.0) + one.sent
  for move in moves(wide, layout):
    if move.what in ('tokens', 'choices', 'experts', 'heads') and move.kind != 'all-reduce':
      key = (move.kind, move.size)
      predicted[key] = predicted.get(key, 0.0) + move.sent
  return sent, predicted


def test_on_emulated_devices_too_tokens_and_experts_travel_as_predicted(emulated):
  sent, predicted = exchanged(*emulated)
  assert (
    set(sent)
    == set(predicted)
    == {(k, n) for k in ('all-gather', 'reduce-scatter') for n in (2, 4)}
  )
  for key, value in predicted.items():
    assert sent[key] == pytest.approx(value, rel=0.01), key


@pytest.mark.parametrize(
  ('exchange', 'fsdp', 'expert', 'changes', 'options'),
  [
    ('all_to_all', 2, 4, {'model.attention': 'experts', 'model.qk_norm': False}, {}),
    thorough('bilevel', 1, 8, {}, {'nodes': 2, 'capacity_factor': 1.25}),
    thorough('sparse_fsdp', 2, 4, {}, {'hot': 2, 'capacity_factor': 1.25}),
    thorough('local', 2, 4, {}, {}),
  ],
)
def test_every_exchange_sends_what_is_predicted(exchange, fsdp, expert, changes, options):
  """Hops between nodes and inside of them, copies of hot experts, experts (and heads) that are all gathered."""
  sent, predicted = exchanged(*compiled_here(exchange, fsdp, expert, changes, **options))
  assert set(sent) == set(predicted)
  for key, value in predicted.items():
    assert sent[key] == pytest.approx(value, rel=0.01), key


def test_on_emulated_devices_too_the_state_is_exact(emulated):
  work, layout, program = emulated
  needed = memory(work, layout)
  state = needed['parameters'] + needed['optimizer']
  arguments = program.memory_analysis().argument_size_in_bytes
  assert arguments == pytest.approx(state, rel=STATE_ERROR)


def test_a_missed_prediction_fails_with_the_worst_figure(monkeypatch, capsys):
  work, topology = workload(settings(), 'tpu'), parse_topology('v5p:2x2x1')
  layout = Layout({'data': 1, 'fsdp': 4, 'expert': 1}, 'local', 1)
  needed = memory(work, layout)
  state = needed['parameters'] + needed['optimizer']
  sent = expected_by_size(work, layout)
  total = sum(needed.values())
  exact = Compiled(state, total - state, total, sent, 1.0, 0.0)
  monkeypatch.setattr('experiments.plan.compile_step', lambda *_: exact)
  check(work, layout, topology)
  assert '+0.0%' in capsys.readouterr().out
  doubled = dataclasses.replace(exact, sent={**sent, ('all-gather', 4): 2 * sent['all-gather', 4]})
  monkeypatch.setattr('experiments.plan.compile_step', lambda *_: doubled)
  with pytest.raises(PredictionMissed, match=r'all-gather over fsdp: .* accepted are -5% to \+5%'):
    check(work, layout, topology)
  # a sum counts once, scattered or not
  scatters, everywhere = ('reduce-scatter', 4), ('all-reduce', 4)
  whole = dataclasses.replace(
    exact, sent={**sent, scatters: 0.0, everywhere: sent[everywhere] + 2 * sent[scatters]}
  )
  assert [one.error for one in compare(work, layout, whole)] == pytest.approx([0.0] * 4)
  assert 0 == scattered(whole.sent) < scattered(sent) < 1
  # a gather may be written as a sum on every device, which sends twice as much
  gather = ('all-gather', 4)
  summed = {key: value for key, value in sent.items() if key != gather}
  summed[everywhere] += 2 * sent[gather]
  rows = {one.what: one for one in compare(work, layout, dataclasses.replace(exact, sent=summed))}
  (merged,) = (name for name in rows if name.startswith('gathers, as sums, and sums over'))
  assert rows[merged].error == pytest.approx(0.0)
  assert rows[merged].compiled > sent[gather]
  # memory is estimated from above: what lives may be less, and hardly more
  for lives, passes in ((0.7, True), (0.5, False), (1.0, True), (1 + 2 * UNDER, False)):
    other = dataclasses.replace(exact, peak=total * lives)
    monkeypatch.setattr('experiments.plan.compile_step', lambda *_, other=other: other)
    assert (1 / lives - 1 <= OVER and lives <= 1 + UNDER) == passes
    if passes:
      check(work, layout, topology)
    else:
      with pytest.raises(PredictionMissed, match=r'memory that .* accepted are -1% to \+60%'):
        check(work, layout, topology)
