"""The Hopper bodies inside programs: under shard_map's checks, and not loaded by those who do not ask for them."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import expert_ffn, grouped_matmul, pack, top_k

UNASKED = """
import sys, jax.numpy as jnp
from pallas_kernels import grouped_matmul
grouped_matmul(jnp.ones((4, 8)), jnp.ones((2, 8, 8)), jnp.array([2, 2], jnp.int32))
print('jax.experimental.mosaic.gpu' in sys.modules or 'pallas_kernels.hopper' in sys.modules)
"""


def test_mosaic_is_not_imported_unless_the_body_is_asked_for():
  command = [sys.executable, '-c', UNASKED]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.stdout.split() == ['False'], done.stderr


def test_tokens_sharded_over_a_mesh_lower_to_kernels_in_value_and_gradient(make_mesh):
  """check_vma=True: the results vary as the arguments do, the gradients of shared weights are summed."""
  mesh = make_mesh(data=4)

  def layer(x, weight, w, expert):
    token = jnp.arange(64, dtype=jnp.int32) // 2
    token = jax.lax.pcast(token, ('data',), to='varying')
    assignment = types.SimpleNamespace(
      token=token, expert=expert, weight=weight, num_experts=4, groups=32
    )
    y = expert_ffn(x, assignment, w, w, w, activation='silu', implementation='gpu')
    sizes = jax.lax.pcast(jnp.array([8, 8, 8, 8], jnp.int32), ('data',), to='varying')
    return grouped_matmul(y, w, sizes, implementation='gpu')

  specs = (P('data'), P('data'), P(), P('data'))
  sharded = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=P('data'))
  loss = lambda *args: jnp.sum(jnp.square(sharded(*args).astype(jnp.float32)))
  args = [
    jax.ShapeDtypeStruct((128, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((256,), jnp.float32),
    jax.ShapeDtypeStruct((4, 128, 128), jnp.bfloat16),
    jax.ShapeDtypeStruct((256,), jnp.int32),
  ]
  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  # Up, down, dH, dX and the gradients of the weights; a grouped matmul, its dlhs and drhs.
  assert text.count('custom_call @mosaic_gpu') == 9


def test_routing_of_a_sharded_batch_lowers_to_its_two_kernels(make_mesh):
  """Tokens and rows of each device by themselves, in value and gradient, under check_vma=True."""

  def route(logits):
    prob, expert = top_k(logits, 2, implementation='gpu')
    order, position, _ = pack(expert.reshape(-1), 6, implementation='gpu')
    return prob, order + position

  specs = dict(mesh=make_mesh(data=4), in_specs=P('data'), out_specs=P('data'))
  sharded = jax.shard_map(route, **specs)

  def loss(logits):
    prob, rows = sharded(logits)
    return prob.sum(), rows

  logits = jax.ShapeDtypeStruct((40, 6), jnp.bfloat16)
  traced = jax.jit(jax.grad(loss, has_aux=True)).trace(logits)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert text.count('custom_call @mosaic_gpu') == 2
