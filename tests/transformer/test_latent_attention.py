import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.mesh.rules import param_shardings
from moejax.mesh.traffic import collective_bytes
from moejax.transformer import (
  Decoder,
  Latent,
  LatentAttention,
  count_params,
  forward_flops_per_token,
  rotation,
  visibility,
)

D, N, H = 16, 3, 4
LATENT = Latent(q_rank=6, kv_rank=5, rotary_dim=2, value_dim=3)


def layer(latent=LATENT, causal=True):
  return LatentAttention(D, N, H, latent, causal=causal, rngs=nnx.Rngs(0))


def norm(x):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def turned(x, position, theta=10000.0):
  """One vector, its pairs (i, i + half) turned as complex numbers."""
  half = x.size // 2
  pairs = x[:half] + 1j * x[half:]
  pairs = pairs * np.exp(1j * position * theta ** (-np.arange(half) / half))
  return np.concatenate([pairs.real, pairs.imag])


def by_loops(model, x, latent, segments):
  """The equations of the module's docstring, token by token and head by head, in float64."""
  w = {
    name: np.asarray(getattr(model, name).weight[...], np.float64)
    for name in ('query_down', 'query_up', 'kv_down', 'kv_up', 'out')
    if getattr(model, name) is not None
  }
  B, S, _ = x.shape
  Hr, Hv = latent.rotary_dim, latent.value_dim or H
  y = np.zeros((B, S, D))
  for b in range(B):
    queries, keys, values = [], [], []
    for s in range(S):
      c_q = norm(x[b, s] @ w['query_down']) if 'query_down' in w else x[b, s]
      own = w['kv_down'].T @ x[b, s]
      c_kv, shared = norm(own[: latent.kv_rank]), turned(own[latent.kv_rank :], s)
      q = (c_q @ w['query_up']).reshape(N, H + Hr)
      kv = (c_kv @ w['kv_up']).reshape(N, H + Hv)
      queries.append([np.concatenate([q[n, :H], turned(q[n, H:], s)]) for n in range(N)])
      keys.append([np.concatenate([kv[n, :H], shared]) for n in range(N)])
      values.append(kv[:, H:])
    for s in range(S):
      seen = [t for t in range(s + 1) if segments[b, t] == segments[b, s]]
      heads = []
      for n in range(N):
        scores = np.array([queries[s][n] @ keys[t][n] for t in seen]) / np.sqrt(H + Hr)
        weights = np.exp(scores - scores.max())
        heads.append(
          sum(p * values[t][n] for p, t in zip(weights / weights.sum(), seen, strict=True))
        )
      y[b, s] = np.concatenate(heads) @ w['out']
  return y


@pytest.mark.parametrize(
  'latent', [LATENT, Latent(q_rank=0, kv_rank=5, rotary_dim=4)], ids=['narrow', 'full queries']
)
def test_latent_attention_equals_its_equations_token_by_token(latent, rng):
  model = layer(latent)
  x = rng.normal(size=(2, 7, D))
  segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1] * 7], np.int32)
  turn = rotation(jnp.arange(7, dtype=jnp.int32)[None, :], latent.rotary_dim)
  visible = visibility(jnp.asarray(segments), None, causal=True)
  y = model(jnp.asarray(x, jnp.float32), turn, visible)
  np.testing.assert_allclose(y, by_loops(model, x, latent, segments), atol=2e-6)


RANKS, LENGTH = 6 + 5 + 2, 64


def on_a_mesh(sizes):
  """`(value, gradients by parameters and x)` of four heads with the parameters where the rules say and tokens cut by
  model width, the compiled program and the mesh."""
  mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
  latent = Latent(q_rank=6, kv_rank=5, rotary_dim=2, value_dim=4)
  model = LatentAttention(D, 4, H, latent, causal=True, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  params = nnx.to_pure_dict(state)
  rules = param_shardings(mesh, {'attention': params})['attention']
  placed = jax.device_put(params, rules)
  cut = NamedSharding(mesh, P(BATCH_AXES, None, 'tensor'))
  shape = (2, LENGTH, D)
  x, dy = (jax.device_put(jax.random.normal(jax.random.key(i), shape), cut) for i in (1, 2))
  turn = rotation(jnp.arange(LENGTH, dtype=jnp.int32)[None, :], latent.rotary_dim)

  def run(params, x):
    nnx.replace_by_pure_dict(state, params)
    y = nnx.merge(graph, state)(x, turn)
    return jax.lax.with_sharding_constraint(y, cut)

  def both(params, x, dy):
    y, back = jax.vjp(run, params, x)
    return y, back(dy)

  compiled = jax.jit(both, out_shardings=(cut, (rules, cut))).lower(placed, x, dy).compile()
  return jax.tree.map(np.asarray, compiled(placed, x, dy)), compiled, mesh


def test_heads_of_latent_attention_over_the_axis_tensor_are_those_of_one_device():
  """In value and gradient, beside data and fsdp too; and four devices make a head each, not all four."""
  want, whole, _ = on_a_mesh((1, 1, 1, 1))
  for sizes in ((1, 1, 1, 4), (2, 1, 1, 4), (1, 2, 1, 4)):
    got, compiled, mesh = on_a_mesh(sizes)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    work = compiled.cost_analysis()['flops'] / whole.cost_analysis()['flops']
    assert work < 1.5 / mesh.size + 0.1
    sent = collective_bytes(compiled, mesh)
    token = 2 * LENGTH // (sizes[0] * sizes[1]) * 4
    # both latents and the shared key are summed each way, the outputs once (XLA:CPU does not scatter)
    assert sent['all-reduce', ('tensor',)] == 2 * 3 / 4 * token * (2 * RANKS + D)
    # and their gradient is gathered, where the batch is cut too for either product with it
    gathers = 1 if mesh.size == 4 else 2
    assert sent['all-gather', ('tensor',)] == gathers * 3 / 4 * token * D
    assert {pair for pair in sent if 'tensor' in pair[1]} == {
      (kind, ('tensor',)) for kind in ('all-reduce', 'all-gather')
    }


def test_beside_tensor_weights_of_latent_attention_travel_over_fsdp_in_parts():
  """Narrow ones too: what a device gathers is its part of each matrix."""
  _, compiled, mesh = on_a_mesh((1, 2, 1, 4))
  weights = D * RANKS + 6 * 4 * (H + 2) + 5 * 4 * (H + 4) + 4 * 4 * D
  sent = collective_bytes(compiled, mesh)
  assert sent['all-gather', ('fsdp',)] == weights / 4 * 4 / 2


def test_a_decoder_with_latent_attention_is_prefix_safe_and_the_same_under_jit(rng):
  latent = Latent(q_rank=6, kv_rank=4, rotary_dim=2)
  model = Decoder(20, D, 2, 2, 24, latent=latent, rngs=nnx.Rngs(0))
  tokens = jnp.asarray(rng.integers(0, 20, size=(2, 6)), jnp.int32)
  graph, state = nnx.split(model)
  run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)[0])
  eager = model(tokens)[0]
  np.testing.assert_allclose(run(state, tokens), eager, atol=1e-5)
  after = run(state, tokens.at[:, 4].set((tokens[:, 4] + 1) % 20))
  np.testing.assert_allclose(after[:, :4], eager[:, :4], atol=1e-5)
  assert np.abs(after - eager)[:, 4:].max(axis=-1).min() > 1e-5


def test_latent_attention_sees_differences_of_positions_only(rng):
  x = jnp.asarray(rng.normal(size=(1, 5, D)), jnp.float32)
  at = lambda first, step=1: layer()(
    x, rotation((first + step * jnp.arange(5, dtype=jnp.int32))[None, :], 2)
  )
  np.testing.assert_allclose(at(0), at(1000), atol=1e-4)
  assert np.abs(at(0) - at(0, 3)).max() > 1e-4


def test_the_base_of_the_rotation_reaches_the_model(rng):
  tokens = jnp.asarray(rng.integers(0, 20, size=(1, 6)), jnp.int32)
  make = lambda theta: Decoder(20, D, 1, 2, 24, rope_theta=theta, rngs=nnx.Rngs(0))(tokens)[0]
  assert np.abs(make(10000.0) - make(100.0)).max() > 1e-4


@pytest.mark.parametrize('q_rank', [0, 6])
def test_flops_of_latent_projections_are_two_for_each_of_their_parameters(q_rank):
  latent = Latent(q_rank=q_rank, kv_rank=5, rotary_dim=2, value_dim=3)
  sizes = dict(vocab_size=10, d_model=D, num_layers=1, num_heads=N, d_ff=8)
  make = lambda: Decoder(**sizes, head_dim=H, latent=latent, rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
  norms = 5 + q_rank
  flops = forward_flops_per_token(**sizes, head_dim=H, latent=latent, seq_len=7)
  assert flops['attention_projections'] == 2 * (count_params(params)['attention'] - norms)
  assert flops['attention_scores'] == 2 * 7 * N * ((H + 2) + 3)


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (dict(q_rank=-1, kv_rank=4, rotary_dim=2), 'q_rank=-1'),
    (dict(q_rank=0, kv_rank=0, rotary_dim=2), 'kv_rank=0'),
    (dict(q_rank=0, kv_rank=4, rotary_dim=3), 'rotary_dim=3'),
  ],
)
def test_sizes_that_make_no_latent_attention_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    Latent(**sizes)


@pytest.mark.parametrize(
  'options', [{'qk_norm': True}, {'num_kv_heads': 1}, {'attention': 'cudnn'}]
)
def test_options_that_latent_attention_does_not_have_are_refused(options):
  with pytest.raises(ValueError, match='latent attention with'):
    Decoder(20, D, 1, 2, 24, latent=Latent(0, 4, 2), **options, rngs=nnx.Rngs(0))
