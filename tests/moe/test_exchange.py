"""What an exchange loses is counted, what it cannot do is refused, and no more travels than must.

Values and gradients of every router under every exchange: tests/test_every_exchange.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Assignment, Context, MoE, oracle
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.mesh.rules import param_shardings
from moejax.mesh.traffic import axes_of, collectives
from moejax.moe.dispatch import DISPATCHES, einsum
from moejax.moe.exchange import EXCHANGES, exchange_options, make_exchange, single

B, S, D, E, F, K = 8, 6, 8, 8, 4, 2
T, R = B * S, B * S * K


def make_layer(exchange, router=None, dispatch='einsum', **options):
  options = {'losses': {}, 'dispatch': DISPATCHES[dispatch], **options}
  router = router or {'name': 'top_k', 'k': K}
  return MoE(D, F, E, router, exchange=exchange, **options, rngs=nnx.Rngs(0))


def tokens():
  return jax.random.normal(jax.random.key(2), (B, S, D), jnp.float32)


def on(mesh, x):
  return jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES)))


def crowded_rows(rng):
  """Of each token two distinct experts, most of them on the first two of four owners."""
  odds = np.array([8, 8, 4, 4, 1, 1, 1, 1]) / 28
  expert = np.stack([rng.choice(E, K, replace=False, p=odds) for _ in range(T)])
  return expert.reshape(-1).astype(np.int32), rng.uniform(0.1, 1, R).astype(np.float32)


def send(exchange, mesh, expert, weight):
  """`(y, lost rows)` of the exchange, and a function of the rows that must have arrived -> y by the oracle."""
  experts = make_layer(single).experts
  x_td = tokens().reshape(T, D)
  token = np.repeat(np.arange(T, dtype=np.int32), K)

  def run(x_td, expert, weight):
    plan = Assignment(jnp.asarray(token), expert, weight, expert, E, T)
    return exchange(x_td, plan, experts, einsum)

  y, lost = jax.jit(run)(
    on(mesh, x_td), on(mesh, jnp.asarray(expert)), on(mesh, jnp.asarray(weight))
  )

  def want(arrived):
    rows = (jnp.where(arrived, expert, E), jnp.where(arrived, weight, 0))
    return oracle.moe(x_td, Assignment(jnp.asarray(token), *rows, rows[0], E, T), experts)

  return y, np.asarray(lost), want


def test_all_to_all_loses_the_last_rows_of_a_full_destination_and_says_which(rng):
  """Four owners of two experts, two data shards: ceil(1 * 12 / 4) = 3 places from each device to each owner."""
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  expert, weight = crowded_rows(rng)
  exchange = make_exchange('all_to_all', mesh, BATCH_AXES, {'capacity_factor': 1})
  y, lost, want = send(exchange, mesh, expert, weight)
  must = np.zeros(R, bool)
  for device in range(8):
    seen = {}
    for row in range(device * R // 8, (device + 1) * R // 8):
      owner = expert[row] // 2
      seen[owner] = seen.get(owner, 0) + 1
      must[row] = seen[owner] > 3
  assert must.sum() > 10
  np.testing.assert_array_equal(lost, must)
  np.testing.assert_allclose(y, want(~must), rtol=1e-5, atol=1e-6)


def test_a_full_ragged_buffer_loses_the_rows_of_the_last_devices(rng):
  """One buffer of 12 places an owner, filled in the order of the senders."""
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  expert, weight = crowded_rows(rng)
  exchange = make_exchange('ragged_all_to_all', mesh, BATCH_AXES, {'buffer_factor': 1})
  y, lost, want = send(exchange, mesh, expert, weight)
  must = np.zeros(R, bool)
  for data in range(2):
    seen = {}
    for row in range(data * R // 2, (data + 1) * R // 2):
      owner = expert[row] // 2
      seen[owner] = seen.get(owner, 0) + 1
      must[row] = seen[owner] > 12
  assert must.sum() > 10
  np.testing.assert_array_equal(lost, must)
  np.testing.assert_allclose(y, want(~must), rtol=1e-5, atol=1e-6)


def test_in_one_kernel_a_full_buffer_loses_rows_of_the_last_experts():
  """Two owners of four experts each; 512 rows a device, all for the first owner. It has 256 places and 120 more
  for what lies between eight segments, rounded up to 384: for the first expert and half of the second."""
  mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
  tokens, size = 512, 1024
  expert = np.concatenate([np.repeat(np.arange(4, dtype=np.int32), size // 8)] * 2)
  weight = np.ones(size, np.float32)
  x_td = jax.random.normal(jax.random.key(3), (2 * tokens, D), jnp.float32)
  token = np.arange(size, dtype=np.int32)
  experts = make_layer(single).experts

  def run(exchange, weight):
    plan = Assignment(jnp.asarray(token), jnp.asarray(expert), weight, jnp.asarray(expert), E, size)
    return exchange(x_td, plan, experts, einsum)

  options = {'buffer_factor': 0.5, 'kernel': 'reference'}
  exchange = make_exchange('ragged_all_to_all', mesh, BATCH_AXES, options)
  y, lost = jax.jit(lambda weight: run(exchange, weight))(jnp.asarray(weight))
  want, _ = run(single, jnp.asarray(np.where(lost, 0, weight)))
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)
  kept = np.bincount(expert[~np.asarray(lost)], minlength=E)
  assert kept.tolist() == [256, 128, 0, 0, 0, 0, 0, 0]


def test_rows_lost_in_the_second_hop_are_told_to_their_device(rng):
  """Two nodes of two devices: what arrives is what is not called lost, and both hops lose something."""
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  expert, weight = crowded_rows(rng)
  options = {'capacity_factor': 1, 'nodes': 2}
  y, lost, want = send(make_exchange('bilevel', mesh, BATCH_AXES, options), mesh, expert, weight)
  np.testing.assert_allclose(y, want(~lost), rtol=1e-5, atol=1e-6)
  first = np.zeros(R, bool)
  for device in range(8):
    seen = {}
    for row in range(device * R // 8, (device + 1) * R // 8):
      node = expert[row] // 4
      seen[node] = seen.get(node, 0) + 1
      first[row] = seen[node] > 6
  assert (lost & first == first).all()
  assert lost.sum() > first.sum() > 0


def test_rows_of_hot_experts_take_no_place_and_the_rest_is_told_when_lost(rng):
  """Four owners of two experts, two data shards, each with hot experts of its own: the other rows of a device have
  one place at each owner."""
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  expert, weight = crowded_rows(rng)
  options = {'hot': 1, 'capacity_factor': 0.25}
  exchange = make_exchange('sparse_fsdp', mesh, BATCH_AXES, options)
  y, lost, want = send(exchange, mesh, expert, weight)
  must = np.zeros(R, bool)
  for device in range(8):
    data = device // 4
    load = np.bincount(expert[data * R // 2 : (data + 1) * R // 2], minlength=E)
    hot = {2 * owner + int(load[2 * owner + 1] > load[2 * owner]) for owner in range(4)}
    seen = {}
    for row in range(device * R // 8, (device + 1) * R // 8):
      owner = expert[row] // 2
      if expert[row] not in hot:
        seen[owner] = seen.get(owner, 0) + 1
        must[row] = seen[owner] > 1
  assert must.sum() > 10
  np.testing.assert_array_equal(lost, must)
  np.testing.assert_allclose(y, want(~must), rtol=1e-5, atol=1e-6)


def test_lost_rows_are_in_the_metrics_apart_from_those_over_capacity():
  """Statistics count what experts worked on: the wanted rows less both kinds of drops."""
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  exchange = make_exchange('all_to_all', mesh, BATCH_AXES, {'capacity_factor': 0.5})
  router = {'name': 'top_k', 'k': K, 'capacity_factor': 0.8}
  layer, alone = make_layer(exchange, router), make_layer(single, router)
  aux = jax.jit(lambda x: layer(x, Context(train=True))[1])(on(mesh, tokens()))
  without = jax.jit(lambda x: alone(x, Context(train=True))[1])(tokens())
  assert float(without.metrics['lost']) == float(without.stats.lost) == 0
  lost, capped = float(aux.stats.lost), R - float(without.stats.kept_e.sum())
  assert lost > 0
  assert capped > 0
  assert float(aux.stats.kept_e.sum()) == R - capped - lost
  assert float(aux.metrics['lost']) == pytest.approx(lost / R)
  assert float(aux.metrics['dropped']) == pytest.approx((lost + capped) / R)
  np.testing.assert_array_equal(aux.stats.chosen_e, without.stats.chosen_e)


def test_rows_of_experts_without_computation_never_travel():
  """MoE++ with a router that wants nothing but copies: not one place is needed, and nothing is lost."""
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  exchange = make_exchange('all_to_all', mesh, BATCH_AXES, {'capacity_factor': 0.01})
  layer = make_layer(exchange, {'name': 'top_k', 'k': 1}, zero_experts={'copy': 1})
  kernel = layer.router.scorer.kernel
  kernel[...] = jnp.zeros_like(kernel[...]).at[0, E].set(9.0)
  x = jnp.abs(tokens()) + 1
  y, aux = jax.jit(lambda x: layer(x))(on(mesh, x))
  assert float(aux.stats.kept_e[E]) == T
  assert float(aux.stats.lost) == 0
  share = np.asarray(y) / np.asarray(x)  # one number a token
  assert share.min() > 0
  np.testing.assert_allclose(share, np.broadcast_to(share[..., :1], x.shape), rtol=1e-5)


@pytest.mark.parametrize('dispatch', DISPATCHES)
def test_every_dispatch_goes_with_an_exchange(dispatch):
  mesh = make_mesh(2, 1, 2, 2, devices=jax.devices())
  exchange = make_exchange('all_to_all', mesh, BATCH_AXES, {'capacity_factor': 0})

  def run(layer, x):
    graph, state = nnx.split(layer)
    objective = lambda state, x: (nnx.merge(graph, state)(x)[0] ** 2).sum()
    return jax.tree.leaves(jax.jit(jax.grad(objective, (0, 1)))(state, x))

  got = run(make_layer(exchange, dispatch=dispatch), on(mesh, tokens()))
  for a, b in zip(got, run(make_layer(single), tokens()), strict=True):
    assert np.abs(np.asarray(a) - b).max() <= 5e-6 * max(np.abs(b).max(), 1e-2)


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('ring', {}, "exchange='ring': accepted are 'all_gather', 'all_to_all'"),
    ('all_gather', {'nodes': 2}, "'all_gather' has no option 'nodes': accepted are none"),
    ('bilevel', {'node': 2}, "accepted are 'nodes', 'capacity_factor', 'chunks'"),
    ('bilevel', {'nodes': 3}, 'nodes=3 does not divide mesh axis expert=4'),
    ('all_to_all', {'chunks': 0}, 'chunks=0: accepted are integers from 1'),
    ('all_to_all', {'capacity_factor': -1.0}, 'capacity_factor=-1.0: accepted are numbers from 0'),
    ('ragged_fallback', {'buffer_factor': -1.0}, 'buffer_factor=-1.0: accepted are numbers'),
    ('sparse_fsdp', {'hot': 0}, 'hot=0: accepted are integers from 1'),
    ('ragged_all_to_all', {'kernel': 'gpu'}, "kernel='gpu': accepted are 'reference', 'tpu' and"),
    ('ragged_all_to_all', {'kernel': 'tpu'}, "kernel='tpu': exchange_matmul: .* a TPU, not cpu"),
    ('ragged_all_to_all', {'kernel': 'reference', 'chunks': 2}, 'with chunks=2: accepted is 1'),
  ],
)
def test_names_and_options_that_do_not_exist_are_refused(name, options, message):
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  with pytest.raises(ValueError, match=message):
    make_exchange(name, mesh, BATCH_AXES, options)


def test_the_options_told_are_those_that_exchanges_take():
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  values = {'nodes': 2, 'chunks': 2, 'capacity_factor': 3.0, 'buffer_factor': 3.0, 'hot': 2}
  values['kernel'] = 'reference'
  for name in EXCHANGES:
    for key in exchange_options(name):
      made = make_exchange(name, mesh, BATCH_AXES, {key: values[key]})
      assert getattr(getattr(made, 'first', made), key) == values[key]


def test_more_hot_experts_than_a_device_has_are_refused():
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  layer = make_layer(make_exchange('sparse_fsdp', mesh, BATCH_AXES, {'hot': 3}))
  with pytest.raises(ValueError, match='hot=3: accepted are 1 to 2, the experts of a device'):
    layer(tokens())


def test_sizes_that_do_not_divide_are_refused():
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  layer = make_layer(make_exchange('all_to_all', mesh, BATCH_AXES))
  with pytest.raises(
    ValueError, match='tokens=18 does not divide over mesh axes data,fsdp,expert=8'
  ):
    layer(tokens()[:3])
  layer = MoE(D, F, 4, exchange=layer.exchange, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='num_experts=4 does not divide over mesh axes expert=8'):
    layer(tokens())
  mesh = make_mesh(1, 1, 1, 8, devices=jax.devices())
  layer = make_layer(make_exchange('all_to_all', mesh, BATCH_AXES))
  with pytest.raises(ValueError, match='d_ff=4 does not divide over mesh axes tensor=8'):
    layer(tokens())
  with pytest.raises(ValueError, match="the last one must be 'expert'"):
    make_exchange('all_gather', mesh, ('expert', 'data'))
  with pytest.raises(ValueError, match="tokens are not sharded over 'tensor'"):
    make_exchange('all_gather', mesh, ('tensor', 'expert'))


def test_ragged_all_to_all_is_the_hardware_operation_on_accelerators():
  """Lowered for TPU and for CUDA, without either; and on CPUs, which lack it, it is not there."""
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  layer = make_layer(make_exchange('ragged_all_to_all', mesh, BATCH_AXES))
  graph, state = nnx.split(layer)
  run = jax.jit(jax.grad(lambda state, x: (nnx.merge(graph, state)(x)[0] ** 2).sum()))
  arguments = jax.device_put((state, tokens()), NamedSharding(mesh, P()))
  for platform in ('tpu', 'cuda'):
    text = run.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert 'ragged_all_to_all' in text
  assert 'ragged_all_to_all' not in run.lower(*arguments).as_text()


def sent(name, options, sizes, router=None):
  """What one device sends in a layer's (forward, backward) pass: two dicts (part, kind, axes) -> bytes, where the part
  is 'exchange', or 'routing' for everything else.

  Both passes are of one compiled program, told apart by the operation that a collective was made from.
  """
  mesh = make_mesh(*sizes, devices=jax.devices())
  layer = make_layer(make_exchange(name, mesh, BATCH_AXES, options), router)
  graph, state = nnx.split(layer)
  shardings = param_shardings(mesh, {'moe': nnx.to_pure_dict(state)})['moe']
  placed = jax.tree.map(jax.device_put, nnx.to_pure_dict(state), shardings)
  nnx.replace_by_pure_dict(state, placed)
  cut = NamedSharding(mesh, P(BATCH_AXES, None, 'tensor'))

  def run(state, x, dy):
    y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x)[0], state, x)
    return jax.lax.with_sharding_constraint(y, cut), pull(dy)

  compiled = jax.jit(run).lower(state, on(mesh, tokens()), jax.device_put(tokens(), cut)).compile()
  total: tuple[dict, dict] = {}, {}
  for one in collectives(compiled, mesh.size):
    part = 'exchange' if 'shard_map' in one.source else 'routing'
    found = total['transpose(' in one.source]
    key = part, one.kind, axes_of(one, mesh)
    found[key] = found.get(key, 0) + one.sent
  return total


ROW = D * 4  # bytes of a token in float32


def routing(size):
  """Of `size` devices along the expert axis: a router of top_k.

  Its product sends nothing. XLA:CPU does not cut `top_k` and gathers the logits, which newer versions name after the
  product that they come of; compiled for TPUs (v5e:2x4) and for H200s, eight of either, nothing is gathered. In the
  backward pass the gradient of the kernel is summed over the tokens of all devices.
  """
  gathered = {('routing', 'all-gather', ('expert',)): (size - 1) / size * T * E * 4}
  return gathered, {('routing', 'all-reduce', ('expert',)): 2 * (size - 1) / size * D * E * 4}


def test_gathering_sends_every_token_to_every_device_once_and_sums_once():
  """Eight devices of six tokens: beside the tokens travel three numbers a row, of which one, the weight, has a
  gradient."""
  forward, backward = sent('all_gather', {}, (1, 1, 8, 1))
  gathered, summed = routing(8)
  assert forward == gathered | {
    ('exchange', 'all-gather', ('expert',)): 7 * 6 * (ROW + K * 3 * 4),
    ('exchange', 'reduce-scatter', ('expert',)): 7 * 6 * ROW,
  }
  assert backward == summed | {
    ('exchange', 'all-gather', ('expert',)): 7 * 6 * ROW,
    ('exchange', 'reduce-scatter', ('expert',)): 7 * 6 * (ROW + K * 4),
  }


def test_all_to_all_sends_its_places_there_and_back():
  """Places of 2 * 12 / 8 = 3 rows, each with its expert, which has no gradient; nothing else travels."""
  places = 8 * 3
  forward, backward = sent('all_to_all', {'capacity_factor': 2.0}, (1, 1, 8, 1))
  gathered, summed = routing(8)
  key = ('exchange', 'all-to-all', ('expert',))
  assert forward == gathered | {key: 7 / 8 * places * (2 * ROW + 4)}
  assert backward == summed | {key: 7 / 8 * places * 2 * ROW}


def test_ranks_of_an_expert_share_its_traffic():
  """Twelve tokens on four devices, twice: each of two tensor ranks sends half of every row, not the same rows twice.

  Each knows the half of a weight's gradient that its part of the width gives: the halves of twelve tokens' are summed.
  """
  places = 4 * 12
  forward, backward = sent('all_to_all', {'capacity_factor': 2.0}, (1, 1, 4, 2))
  gathered, summed = routing(4)
  inside = {
    ('exchange', 'all-gather', ('tensor',)): places * ROW / 2,
    ('exchange', 'reduce-scatter', ('tensor',)): places * ROW / 2,
  }
  key = ('exchange', 'all-to-all', ('expert',))
  assert forward == gathered | inside | {key: 3 / 4 * places * (2 * ROW / 2 + 4)}
  of_weights = {('exchange', 'all-reduce', ('tensor',)): 2 / 2 * 12 * K * 4}
  assert backward == summed | inside | of_weights | {key: 3 / 4 * places * 2 * ROW / 2}


def test_a_second_hop_stays_inside_of_the_node():
  """Two nodes of four devices; lost rows come back as a byte each."""
  forward, backward = sent('bilevel', {'capacity_factor': 2.0, 'nodes': 2}, (1, 1, 8, 1))
  between, within = 1 / 2 * (2 * 12), 3 / 4 * (4 * 6)  # rows that leave a device in either hop
  gathered, summed = routing(8)
  key = ('exchange', 'all-to-all', ('expert',))
  assert forward == gathered | {key: between * (2 * ROW + 4 + 1) + within * (2 * ROW + 4)}
  assert backward == summed | {key: (between + within) * 2 * ROW}


def test_of_soft_routers_only_slots_travel():
  """One sequence a device, eight experts of two slots: S does not enter. The router has a vector for each slot."""
  forward, backward = sent('all_to_all', {}, (1, 1, 8, 1), {'name': 'soft', 'slots': 2})
  key = ('exchange', 'all-to-all', ('expert',))
  assert forward == {key: 2 * 7 / 8 * E * 2 * ROW}
  summed = {('routing', 'all-reduce', ('expert',)): 2 * 7 / 8 * D * E * 2 * 4}
  assert backward == summed | {key: 2 * 7 / 8 * E * 2 * ROW}


def test_weights_that_come_to_tokens_are_gathered_once():
  """FSDP over the expert axis: three matrices of eight experts, of which a device has one.

  XLA:CPU drops the barriers of jax.checkpoint: the gather of the backward pass is here that of the forward pass.
  """
  forward, backward = sent('local', {}, (1, 1, 8, 1))
  gathered, summed = routing(8)
  weights = 7 * 3 * D * F * 4
  assert forward == gathered | {('exchange', 'all-gather', ('expert',)): weights}
  assert backward == summed | {('exchange', 'reduce-scatter', ('expert',)): weights}


def test_hot_experts_are_gathered_and_the_places_are_for_the_others():
  """Four devices of two experts, one of them hot: its three matrices to three others, beside the sum of the loads, and
  their gradient back; twelve tokens with a quarter of the places that all rows would need."""
  options = {'hot': 1, 'capacity_factor': 0.5}
  forward, backward = sent('sparse_fsdp', options, (2, 1, 4, 1))
  hot, places = 3 * D * F * 4, 4 * 2
  of_logits = 7 / 8 * T * E * 4
  axes = ('expert',)
  assert forward == {
    ('routing', 'all-gather', ('data', 'expert')): of_logits,
    ('exchange', 'all-reduce', axes): 2 * 3 / 4 * E * 4,
    ('exchange', 'all-gather', axes): 3 * hot,
    ('exchange', 'all-to-all', axes): 3 / 4 * places * (2 * ROW + 4),
  }
  assert backward == {
    ('routing', 'all-reduce', ('data', 'expert')): 2 * 7 / 8 * D * E * 4,
    ('exchange', 'reduce-scatter', axes): 3 * hot,
    ('exchange', 'all-to-all', axes): 3 / 4 * places * 2 * ROW,
    # of all experts' gradients over `data`, after those of the copies are back
    ('exchange', 'all-reduce', ('data',)): 2 * 1 / 2 * 2 * 3 * D * F * 4,
  }
