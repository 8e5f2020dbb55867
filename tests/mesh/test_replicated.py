"""Routers whose loops end when values say so: on a mesh every device makes all steps, and waits for no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context, make_router
from moejax.mesh.make import BATCH_AXES
from moejax.mesh.make import make_mesh as whole_mesh
from moejax.mesh.replicated import replicated

B, S, D, E = 8, 6, 8, 8
COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
ROUTERS = {
  'base': {'name': 'base'},
  'capped expert choice': {'name': 'expert_choice', 'group': 'batch', 'cap': 2},
}


def route(row):
  options = dict(ROUTERS[row])
  router = make_router(options.pop('name'), d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
  mask = jnp.arange(S)[None] < jnp.array([S, S, 2, S, S, 4, S, S])[:, None]

  def rows(x):
    plan = router(x, Context(mask=mask, train=True))
    return plan.token, plan.expert, plan.weight

  return jax.jit(rows)


@pytest.mark.parametrize('row', ROUTERS)
def test_no_loop_waits_for_other_devices_and_the_choice_is_that_of_one(row):
  """Sequences lie over four devices, twice: what two devices both have may not differ in the number of steps."""
  x = jax.random.normal(jax.random.key(2), (B, S, D))
  program = route(row)
  want = program(x)
  x = jax.device_put(x, NamedSharding(whole_mesh(1, 2, 2, 2, devices=jax.devices()), P(BATCH_AXES)))
  compiled = program.lower(x).compile()
  functions, main = compiled.as_text().split('\nENTRY ')
  assert ' while(' in main + functions
  assert any(f' {name}(' in main for name in COLLECTIVES)
  assert not any(f' {name}(' in functions for name in COLLECTIVES)
  for a, b in zip(compiled(x), want, strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_arrays_are_what_they_are_without_a_mesh_and_in_shard_map(make_mesh):
  x = jnp.arange(8.0)
  np.testing.assert_array_equal(jax.jit(replicated)(x), x)
  mesh = make_mesh(data=4)
  own = jax.jit(jax.shard_map(replicated, mesh=mesh, in_specs=P('data'), out_specs=P('data')))
  np.testing.assert_array_equal(own(x), x)
  sharded = jax.device_put(x, NamedSharding(mesh, P('data')))
  assert jax.jit(replicated)(sharded).sharding.is_fully_replicated
