"""Every router on eight simulated devices is the router on one: value, gradients, statistics, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context, MoE
from moejax.mesh.make import AXES, make_mesh
from moejax.moe.dispatch import DISPATCHES
from moejax.moe.exchange import AllGather, Local, single

B, S, D, E, F = 8, 6, 8, 4, 6

ROUTERS = {
  'top_k': {'name': 'top_k', 'k': 2},
  'capped': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'choice_major'},
  'noisy': {'name': 'top_k', 'k': 1, 'noise_std': 1.0},
  'expert_choice': {'name': 'expert_choice'},
  'expert_choice_batch': {'name': 'expert_choice', 'group': 'batch'},
  'expert_choice_position': {
    'name': 'expert_choice',
    'group': 'position',
    'softmax_over': 'tokens',
  },
  'soft': {'name': 'soft', 'slots': 2},
  'dense': {'name': 'dense'},
}
MESHES = {'8x1x1': (8, 1, 1), '2x1x4': (2, 1, 4), '2x2x2': (2, 2, 2)}


def apply(layer, x, skew):
  """Loss, outputs, stats and gradients; `skew` moves all tokens towards the experts of one direction."""
  graph, state = nnx.split(layer)
  mask = jnp.arange(S)[None] < jnp.array([S, S, 2, S, S, 4, S, S])[:, None]
  context = Context(mask=mask, rng=jax.random.key(1), train=True)

  def objective(state, x):
    y, aux = nnx.merge(graph, state)(x + skew, context)
    return (y**2).sum() + sum(aux.losses.values()), (y, aux.stats)

  (loss, (y, stats)), gradients = jax.jit(
    jax.value_and_grad(objective, (0, 1), has_aux=True, allow_int=True)
  )(state, x)
  return jax.tree.map(np.asarray, (loss, y, stats, nnx.to_pure_dict(gradients[0]), gradients[1]))


def check_same(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(a - b).max() <= 2e-6 * max(np.abs(b).max(), 1e-2)


@pytest.fixture(scope='module')
def reference():
  """The layer on one device, computed once a router and skew."""
  cache = {}

  def compute(router, skew):
    if (router, skew) not in cache:
      cache[router, skew] = apply(*layer_and_tokens(router, single), skew)
    return cache[router, skew]

  return compute


def layer_and_tokens(router, exchange, dispatch='fused'):
  losses = {'balance': 1.0, 'z': 0.1, 'sequence_balance': 0.1}
  layer = MoE(
    D,
    F,
    E,
    ROUTERS[router],
    losses=losses,
    exchange=exchange,
    dispatch=DISPATCHES[dispatch],
    rngs=nnx.Rngs(0),
  )
  return layer, jax.random.normal(jax.random.key(2), (B, S, D))


@pytest.mark.parametrize('skew', [0.0, 3.0], ids=['even', 'skewed'])
@pytest.mark.parametrize('mesh', MESHES)
@pytest.mark.parametrize('router', ROUTERS)
def test_all_gather_is_the_single_device(router, mesh, skew, reference):
  sizes = make_mesh(*MESHES[mesh], devices=jax.devices())
  layer, x = layer_and_tokens(router, AllGather(sizes, AXES))
  x = jax.device_put(x, NamedSharding(sizes, P(AXES)))
  check_same(apply(layer, x, skew), reference(router, skew))


@pytest.mark.parametrize('router', ['top_k', 'capped', 'expert_choice', 'dense'])
def test_local_is_the_single_device(router, reference):
  mesh = make_mesh(devices=jax.devices())
  layer, x = layer_and_tokens(router, Local(mesh, AXES))
  x = jax.device_put(x, NamedSharding(mesh, P(AXES)))
  check_same(apply(layer, x, 0.0), reference(router, 0.0))


@pytest.mark.parametrize('dispatch', sorted(set(DISPATCHES) - {'fused'}))
def test_every_dispatch_goes_with_an_exchange(dispatch, reference):
  mesh = make_mesh(2, 1, 4, devices=jax.devices())
  layer, x = layer_and_tokens('top_k', AllGather(mesh, AXES), dispatch)
  x = jax.device_put(x, NamedSharding(mesh, P(AXES)))
  check_same(apply(layer, x, 0.0), reference('top_k', 0.0))


def test_the_comparison_can_fail(reference):
  """Experts moved by one device give other outputs: the tolerance sees it."""
  layer, x = layer_and_tokens('top_k', single)
  nnx.update(layer.experts, jax.tree.map(lambda w: jnp.roll(w, 1, 0), nnx.split(layer.experts)[1]))
  with pytest.raises(AssertionError):
    check_same(apply(layer, x, 0.0), reference('top_k', 0.0))


def test_what_cannot_be_exchanged_is_refused_by_name():
  mesh = make_mesh(devices=jax.devices())
  layer, x = layer_and_tokens('expert_choice_batch', Local(mesh, AXES))
  with pytest.raises(ValueError, match="exchange='local' .* accepted is exchange='all_gather'"):
    layer(x)
  layer, x = layer_and_tokens('top_k', Local(mesh, AXES))
  with pytest.raises(
    ValueError, match='tokens=18 does not divide over mesh axes data,fsdp,expert=8'
  ):
    layer(x[:3])
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  layer, x = layer_and_tokens('top_k', AllGather(mesh, AXES))
  with pytest.raises(ValueError, match='num_experts=4 does not divide over mesh axes expert=8'):
    layer(x)


def test_the_compiled_program_holds_one_gather_and_one_scatter():
  """Forward pass on an expert axis: tokens gathered once, outputs reduced and scattered once, no all-to-all."""
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  layer = MoE(
    D, F, 8, {'name': 'top_k'}, losses={}, exchange=AllGather(mesh, AXES), rngs=nnx.Rngs(0)
  )
  graph, state = nnx.split(layer)
  x = jax.device_put(jnp.zeros((B, S, D)), NamedSharding(mesh, P(AXES)))
  shape = f'f32[{B * S},{D}]'
  text = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[0]).lower(state, x).compile().as_text()
  gathers = [line for line in text.splitlines() if ' all-gather(' in line and shape in line]
  scatters = [line for line in text.splitlines() if ' reduce-scatter(' in line]
  assert len(gathers) == 1
  assert len(scatters) == 1
  assert 'all-to-all' not in text
