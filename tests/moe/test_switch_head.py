"""Experts for the values and outputs of heads, against every expert of every head on every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.attention_experts import AttentionExperts
from moejax.moe.switch_head import SwitchHead
from moejax.transformer import rotation

B, S, D, H, N, E = 2, 5, 8, 4, 2, 3
TURN = rotation(jnp.arange(S, dtype=jnp.int32)[None], H)


def make(**options):
  return SwitchHead(D, H, E, num_heads=N, **options, rngs=nnx.Rngs(0))


def weights(x, kernel, k):
  """`[B, S, N, E]`: sigmoids, but zero where k or more of the head's are larger."""
  gate = jax.nn.sigmoid(x @ kernel).reshape(B, S, N, E)
  larger = (gate[..., None, :] > gate[..., :, None]).sum(-1)
  return jnp.where(larger < k, gate, 0)


def by_all_experts(layer, x):
  def turn(z):
    real, imaginary = z[..., : H // 2], z[..., H // 2 :]
    cos, sin = TURN
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)

  to_value = weights(x, layer.value_router[...], layer.k)
  to_out = weights(x, layer.out_router[...], layer.k)
  later = jnp.arange(S)[:, None] < jnp.arange(S)[None]
  y = jnp.zeros_like(x)
  for n in range(N):
    own = slice(n * H, (n + 1) * H)
    q, k = turn(x @ layer.query.weight[...][:, own]), turn(x @ layer.key.weight[...][:, own])
    score = jnp.where(later[None], -jnp.inf, jnp.einsum('bqh,bkh->bqk', q, k) / 2)
    v = sum(to_value[:, :, n, e, None] * (x @ layer.w_value[...][n * E + e]) for e in range(E))
    seen = jax.nn.softmax(score, -1) @ v
    y += sum(to_out[:, :, n, e, None] * (seen @ layer.w_out[...][n * E + e]) for e in range(E))
  return y


def test_chosen_experts_are_those_of_all_experts_in_value_and_gradient():
  layer, x = make(), jax.random.normal(jax.random.key(1), (B, S, D))
  graph, state = nnx.split(layer)
  target = jax.random.normal(jax.random.key(2), x.shape)

  def both(apply):
    loss = lambda state, x: (apply(nnx.merge(graph, state), x) * target).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)

  got, want = both(lambda layer, x: layer(x, None, TURN)[0]), both(by_all_experts)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  for router in (got[1][0].value_router, got[1][0].out_router):
    assert float(jnp.abs(router[...]).max()) > 1e-4


def test_later_tokens_and_padding_do_not_show():
  graph, state = nnx.split(make())
  apply = jax.jit(lambda x, mask: nnx.merge(graph, state)(x, Context(mask=mask)))
  x = jax.random.normal(jax.random.key(1), (B, S, D))
  mask = jnp.array([[True] * S, [True] * 3 + [False] * 2])
  y, aux = apply(jnp.where(mask[..., None], x, jnp.nan), mask)
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert bool(jnp.isfinite(y).all())
  assert float(aux.stats.kept_e.sum()) == 2 * N * 2 * 8  # both sides, heads, choices, real tokens
  assert float(aux.stats.tokens) == 8
  changed = apply(x.at[:, 2:].set(7.0), mask)[0]
  np.testing.assert_allclose(changed[:, :2], y[:, :2], atol=1e-5)
  assert float(jnp.abs(changed[:, 2:] - y[:, 2:]).max()) > 1e-3


def test_work_and_active_parameters_counted_by_hand():
  layer = make(k=2)
  assert layer.active_share(S) == 2 / 3
  assert layer.flops_per_token(S) == {
    'attention_projections': N * (2 * 2 * D * H + 2 * 2 * 2 * D * H),
    'attention_scores': N * 2 * S * 2 * H,
    'attention_router': 2 * 2 * D * N * E,
  }


def test_sizes_out_of_range_are_refused():
  with pytest.raises(ValueError, match='k=4 with num_experts=3: accepted are 1 to 3'):
    make(k=4)


@pytest.mark.parametrize('kind', [SwitchHead, AttentionExperts])
def test_sequences_on_two_devices_give_the_gradients_of_one(kind):
  graph, state = nnx.split(kind(D, H, E, rngs=nnx.Rngs(0)))
  x = jax.random.normal(jax.random.key(1), (B, S, D))
  mesh = make_mesh(2, devices=jax.devices()[:2])
  loss = lambda state, x: (nnx.merge(graph, state)(x, None, TURN)[0] ** 2).sum()
  step = jax.jit(jax.value_and_grad(loss, (0, 1)))
  placed = jax.device_put(x, NamedSharding(mesh, P(BATCH_AXES)))
  everywhere = jax.device_put(state, NamedSharding(mesh, P()))
  for a, b in zip(
    jax.tree.leaves(step(everywhere, placed)), jax.tree.leaves(step(state, x)), strict=True
  ):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5)
