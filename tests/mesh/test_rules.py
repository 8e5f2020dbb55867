"""Every parameter of every model lies where exactly one rule says."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax import MoE
from moejax.mesh.make import make_mesh
from moejax.mesh.rules import like_params, param_shardings, path_name, spec_of
from moejax.transformer import Decoder, ViT

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


def test_the_layer_axis_is_never_sharded():
  assert spec_of('stack/segments/0/blocks/1/moe/experts/w_up', 4) == P(None, 'expert', 'fsdp', None)
  assert spec_of('moe/experts/w_up', 3) == P('expert', 'fsdp', None)


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
