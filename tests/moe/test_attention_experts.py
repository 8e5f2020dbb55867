"""Attention heads as experts, against every head on every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE
from moejax.moe.attention_experts import AttentionExperts, broken_sticks
from moejax.transformer import Block, rotation

B, S, D, H, E = 2, 5, 8, 4, 3
TURN = rotation(jnp.arange(S, dtype=jnp.int32)[None], H)


def make(**options):
  return AttentionExperts(D, H, E, **options, rngs=nnx.Rngs(0))


def by_all_heads(layer, x):
  """Every head's attention, written out, times the combine weights `[T, E]`."""
  plan = layer.router(x)
  weight = jnp.zeros((B * S, E)).at[plan.token, plan.expert].add(plan.weight).reshape(B, S, E)

  def turn(z):
    real, imaginary = z[..., : H // 2], z[..., H // 2 :]
    cos, sin = TURN
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)

  k, v = turn(x @ layer.key.weight[...]), x @ layer.value.weight[...]
  y = jnp.zeros_like(x)
  for e in range(E):
    score = jnp.einsum('bqh,bkh->bqk', turn(x @ layer.w_query[...][e]), k) / 2
    later = jnp.arange(S)[:, None] < jnp.arange(S)[None]
    share = jax.nn.softmax(jnp.where(later[None], -jnp.inf, score), -1)
    y = y + weight[..., e : e + 1] * ((share @ v) @ layer.w_out[...][e])
  return y


def test_chosen_heads_are_those_of_all_heads_in_value_and_gradient():
  layer, x = make(), jax.random.normal(jax.random.key(1), (B, S, D))
  graph, state = nnx.split(layer)
  target = jax.random.normal(jax.random.key(2), x.shape)

  def both(apply):
    loss = lambda state, x: (apply(nnx.merge(graph, state), x) * target).sum()
    return jax.jit(jax.value_and_grad(loss, (0, 1)))(state, x)

  got, want = both(lambda layer, x: layer(x, None, TURN)[0]), both(by_all_heads)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert float(jnp.abs(got[1][0].router.scorer.kernel[...]).max()) > 1e-4


@pytest.mark.parametrize('kind', ['softmax', 'stick_breaking'])
def test_later_tokens_and_padding_do_not_show(kind):
  graph, state = nnx.split(make(kind=kind))
  apply = jax.jit(lambda x, mask: nnx.merge(graph, state)(x, Context(mask=mask)))
  x = jax.random.normal(jax.random.key(1), (B, S, D))
  mask = jnp.array([[True] * S, [True] * 3 + [False] * 2])
  y, aux = apply(jnp.where(mask[..., None], x, jnp.nan), mask)
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert bool(jnp.isfinite(y).all())
  assert float(aux.stats.kept_e.sum()) == 2 * 8
  changed = apply(x.at[:, 2:].set(7.0), mask)[0]
  np.testing.assert_allclose(changed[:, :2], y[:, :2], atol=1e-5)
  assert float(jnp.abs(changed[:, 2:] - y[:, 2:]).max()) > 1e-3


def test_a_broken_stick_has_the_published_parts():
  """Position 2 with logits 0.5, -1, 0.2: 0.204850, 0.121068, 0.549834, together 0.875752; loops agree."""
  logits = jnp.array([[0.1, 9.0, 9.0], [0.3, -0.7, 9.0], [0.5, -1.0, 0.2]])
  seen = jnp.tri(3, dtype=bool)
  got = broken_sticks(jnp.where(seen, logits, -1e9), seen)
  np.testing.assert_allclose(got[2], [0.204850, 0.121068, 0.549834], atol=1e-6)
  sigmoid = 1 / (1 + np.exp(-np.asarray(logits)))
  for i in range(3):
    left = 1.0
    for j in range(i, -1, -1):
      np.testing.assert_allclose(got[i, j], left * sigmoid[i, j], atol=1e-6)
      left *= 1 - sigmoid[i, j]


def test_routers_that_do_not_choose_by_token_are_refused():
  layer = make(router={'name': 'expert_choice'})
  with pytest.raises(ValueError, match='accepted are those that choose by token'):
    layer(jnp.zeros((1, S, D)))
  with pytest.raises(ValueError, match="kind='linear': accepted are 'softmax', 'stick_breaking'"):
    make(kind='linear')


def test_heads_and_mixture_of_a_block_draw_noise_of_their_own():
  """Two noisy routers of zero kernels, whose choices are noise alone, choose unlike experts."""
  router = {'name': 'noisy_top_k', 'k': 1, 'weighting': 'softmax_topk'}
  layers = {
    'attention': AttentionExperts(D, H, 8, router, rngs=nnx.Rngs(0)),
    'moe': MoE(D, 6, 8, router, rngs=nnx.Rngs(0)),
  }
  block = Block(D, **layers, rngs=nnx.Rngs(0))
  context = Context(train=True, rng=jax.random.key(5))
  _, (heads, mixture), _ = block(jnp.ones((2, 32, D)), context)
  assert heads.part == 'attention'
  assert heads.chosen_e.tolist() != mixture.chosen_e.tolist()
