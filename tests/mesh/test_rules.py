"""Every parameter of every model lies where exactly one rule says."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import MoE, make_router
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import RULES, like_params, param_shardings, path_name, rule_of, spec_of
from moejax.moe.cartesian import CartesianMoE
from moejax.moe.multi_head import MultiHeadMoE
from moejax.moe.peer import Peer
from moejax.transformer import Decoder, ViT
from tests import router_table as table

moe = functools.partial(MoE, 16, 32, 4, num_shared=1, output_norm=True)


SIZES = {'d_model': 16, 'num_layers': 4, 'num_heads': 2, 'd_ff': 32, 'qk_norm': True}


def decoder():
  bias = {'name': 'top_k', 'balance_bias': True}
  options = {
    'moe': lambda rngs: moe(bias, rngs=rngs),
    'moe_layers': (1, 3),
    'tie_embeddings': False,
  }
  return Decoder(64, **SIZES, **options, rngs=nnx.Rngs(0))


def vit():
  options = {'moe': lambda rngs: moe('soft', rngs=rngs), 'moe_layers': (2, 3)}
  return ViT((8, 8, 1), 4, 10, **SIZES, **options, rngs=nnx.Rngs(0))


MIXTURES = {
  'mixed with shared experts': lambda rngs: moe(shared_mix=True, rngs=rngs),
  'experts without computation': lambda rngs: moe(
    zero_experts={'copy': 1, 'constant': 2}, rngs=rngs
  ),
  'single neurons': lambda rngs: Peer(16, 64, heads=2, k=4, rngs=rngs),
  'heads of a token': lambda rngs: MultiHeadMoE(16, 32, 4, heads=2, rngs=rngs),
  'two in a row': lambda rngs: CartesianMoE(16, 32, 4, num_shared=1, rngs=rngs),
}


@pytest.mark.parametrize('mixture', MIXTURES)
def test_every_variable_of_every_mixture_matches_one_rule(mixture):
  model = lambda: Decoder(64, **SIZES, moe=MIXTURES[mixture], moe_layers=(1, 3), rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(model))[1])
  shardings = param_shardings(make_mesh(2, 2, 2, devices=jax.devices()), params)
  names = {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shardings)}
  assert len([name for name in names if '/moe/' in name]) >= 4


@pytest.mark.parametrize('make', [decoder, vit])
def test_every_variable_matches_one_rule_and_moments_follow(make):
  mesh = make_mesh(2, 2, 2, devices=jax.devices())
  params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(make))[1])
  shardings = param_shardings(mesh, params)
  by_name = {
    path_name(path): sharding.spec
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
  }
  experts = [spec for name, spec in by_name.items() if 'moe/experts/' in name]
  assert experts
  assert all('expert' in spec for spec in experts)
  routers = [spec for name, spec in by_name.items() if '/router/' in name]
  assert routers
  assert set(routers) == {P()}
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  moments = like_params(mesh, state, params, shardings)
  assert (
    jax.tree.leaves(moments[0].mu) == jax.tree.leaves(shardings) == jax.tree.leaves(moments[0].nu)
  )
  assert moments[0].count.spec == P()


def test_every_parameter_of_every_router_is_on_every_device():
  """And no pattern of a scorer's parameters is one that no router needs."""
  needed = set()
  for row, options in table.ROWS.items():
    options = dict(options)
    make = functools.partial(make_router, options.pop('name'), **options)
    router = nnx.eval_shape(lambda make=make: make(d_model=16, num_experts=8, rngs=nnx.Rngs(0)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.split(router)[1])):
      name = f'moe/router/{path_name(path)}'
      assert spec_of(name, leaf.ndim) == P(), row
      needed.add(rule_of(name))
  assert needed == {rule for rule in RULES if re.search(r'router/(scorer|bias)', rule[0])}


@pytest.mark.parametrize('name', ['new', 'first/new', 'kernel/new', 'new/kernel', 'kernel2'])
def test_a_parameter_that_no_scorer_has_yet_is_asked_about(name):
  """A table of a million rows would else lie on every device without a word."""
  with pytest.raises(ValueError, match=f'parameter moe/router/scorer/{name} must match one rule'):
    spec_of(f'moe/router/scorer/{name}', 2)


def test_the_layer_axis_is_never_sharded():
  assert spec_of('stack/segments/0/blocks/1/moe/experts/w_up', 4) == P(
    None, 'expert', 'fsdp', 'tensor'
  )
  assert spec_of('moe/experts/w_up', 3) == P('expert', 'fsdp', 'tensor')


def test_no_rule_and_two_rules_are_errors():
  with pytest.raises(ValueError, match='parameter foo/bar must match one rule .* it matches none'):
    spec_of('foo/bar', 2)
  rules = (('w', ()), (r'\w', ()))
  with pytest.raises(ValueError, match="it matches 'w' and"):
    spec_of('foo/w', 2, rules)


def test_sizes_that_do_not_divide_are_refused():
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  params = {'moe': {'experts': {'w_up': jax.ShapeDtypeStruct((4, 8, 8), jnp.float32)}}}
  with pytest.raises(
    ValueError, match='moe/experts/w_up of size 4 does not divide over mesh axis expert=8'
  ):
    param_shardings(mesh, params)


STRATEGIES = {  # sizes of data, fsdp, expert, tensor -> shards of an expert's weight, of a hidden matrix, of the batch
  'data': ((8, 1, 1, 1), 1, 1),
  'fsdp': ((1, 8, 1, 1), 8, 8),
  'expert': ((2, 1, 4, 1), 4, 1),
  'tensor': ((1, 1, 1, 8), 8, 8),
  'expert, fsdp and tensor': ((1, 2, 2, 2), 8, 4),
}


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_one_table_serves_every_strategy(strategy):
  """A mesh's sizes are the strategy; shards of the optimizer's moments are those of the parameters."""
  sizes, of_expert, of_hidden = STRATEGIES[strategy]
  mesh = make_mesh(*sizes, devices=jax.devices())
  params = nnx.to_pure_dict(nnx.split(nnx.eval_shape(decoder))[1])
  shardings = param_shardings(mesh, params)
  state = jax.eval_shape(optax.adam(1e-3).init, params)
  placed = like_params(mesh, state, params, shardings)
  for tree, leaves in ((shardings, params), (placed[0].mu, state[0].mu)):
    parts = {
      path_name(path): leaf.size // math.prod(sharding.shard_shape(leaf.shape))
      for (path, sharding), leaf in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(leaves), strict=True
      )
    }
    assert {n for name, n in parts.items() if 'moe/experts/' in name} == {of_expert}
    assert {n for name, n in parts.items() if 'ffn/up' in name} == {of_hidden}


def test_axes_that_a_mesh_lacks_shard_nothing():
  mesh = jax.make_mesh((8,), ('expert',), axis_types=(jax.sharding.AxisType.Auto,))
  params = {'moe': {'experts': {'w_up': jax.ShapeDtypeStruct((8, 8, 8), jnp.float32)}}}
  assert param_shardings(mesh, params)['moe']['experts']['w_up'].spec == P('expert', None, None)
