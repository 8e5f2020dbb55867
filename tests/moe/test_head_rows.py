"""Rows of heads that are experts on a mesh: worked on beside their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.mesh.traffic import collective_bytes
from moejax.moe.attention_experts import AttentionExperts
from moejax.moe.head_rows import BesideTokens, by_expert
from moejax.moe.switch_head import SwitchHead

B, S, D, H, E, K = 8, 4, 8, 4, 3, 2
R = B * S * K


def test_a_row_meets_the_matrix_of_its_expert_and_of_none_is_zero():
  x = jax.random.normal(jax.random.key(0), (B * S, D))
  kernel = jax.random.normal(jax.random.key(1), (E, D, H))
  expert = jax.random.randint(jax.random.key(2), (R,), 0, E + 1, jnp.int32)
  found = np.asarray(by_expert(x, expert, kernel))
  for r, e in enumerate(np.asarray(expert)):
    wanted = np.zeros(H) if e == E else np.asarray(x)[r // K] @ np.asarray(kernel)[e]
    np.testing.assert_allclose(found[r], wanted, atol=1e-5)


@pytest.mark.parametrize('kind', [SwitchHead, AttentionExperts])
def test_on_a_mesh_values_and_gradients_are_those_of_one_device_and_no_row_travels(kind):
  mesh = make_mesh(2, 2, 2, devices=jax.devices())
  alone = kind(D, H, E, rngs=nnx.Rngs(0))
  spread = kind(D, H, E, work=BesideTokens(mesh, BATCH_AXES), rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (B, S, D))

  def step(layer):
    graph, _ = nnx.split(layer)
    loss = lambda state, x: (nnx.merge(graph, state)(x)[0] ** 2).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1)))

  state = nnx.split(alone)[1]
  wanted = step(alone)(state, x)
  placed = jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES)))
  state = jax.device_put(state, NamedSharding(mesh, P()))
  compiled = step(spread).lower(state, placed).compile()
  for a, b in zip(jax.tree.leaves(compiled(state, placed)), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4)
  sent = collective_bytes(compiled, mesh)
  assert not {key for key in sent if key[0].endswith('all-to-all')}
  # matrices are gathered, and their gradients scattered: over `fsdp`, of two devices half of each
  first = alone.w_query if kind is AttentionExperts else alone.w_value
  matrices = 4 * (first[...].size + alone.w_out[...].size)
  assert sent['all-gather', ('fsdp',)] == sent['reduce-scatter', ('fsdp',)] == matrices / 2
