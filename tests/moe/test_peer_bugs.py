"""Bugs that other code bases shipped in their expert-parallel paths, each as a test of ours.

Others of the kind: uncounted truncation (tests/moe/test_exchange.py), experts with FSDP that could not be combined
(tests/test_every_exchange.py, meshes of three axes), auxiliary gradients that shrink under accumulation
(tests/experiments/test_step.py), a body chosen by comparing a device with the name of its platform
(test_ragged_all_to_all_is_the_hardware_operation_on_accelerators of tests/moe/test_exchange.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context, MoE
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.controllers import balance_bias
from moejax.moe.dispatch import einsum
from moejax.moe.exchange import make_exchange, single
from moejax.routers.router import RouterBias

B, S, D, E, F = 8, 4, 8, 8, 4


def make_layer(exchange, losses):
  options = {'losses': losses, 'exchange': exchange, 'dispatch': einsum}
  return MoE(D, F, E, {'name': 'top_k', 'k': 2}, **options, rngs=nnx.Rngs(0))


def tokens(skew=0.0):
  """Every sequence with a direction of its own: each device wants other experts than the next."""
  own = jnp.asarray(skew, jnp.float32) * jax.random.normal(jax.random.key(3), (B, 1, D))
  return jax.random.normal(jax.random.key(2), (B, S, D)) + own


def on_mesh(name, options=None):
  mesh = make_mesh(1, 1, 8, devices=jax.devices())
  return make_exchange(name, mesh, BATCH_AXES, options), NamedSharding(mesh, P(BATCH_AXES))


@pytest.mark.parametrize('name', ['all_gather', 'ragged_all_to_all'])
def test_the_task_alone_trains_the_router(name):
  """MaxText's ring of experts gave the combine weights no gradient for four months (fixed by its PR 5042): 0 instead of
  602, which a test with an absolute tolerance of 0.08 let pass. Here: no auxiliary loss, tolerance by scale."""
  exchange, sharding = on_mesh(name)

  def router_gradient(exchange, x):
    graph, state = nnx.split(make_layer(exchange, {}))
    run = jax.jit(jax.grad(lambda state, x: (nnx.merge(graph, state)(x)[0] ** 2).sum()))
    return np.asarray(run(state, x).router.scorer.kernel[...])

  got = router_gradient(exchange, jax.device_put(tokens(), sharding))
  want = router_gradient(single, tokens())
  assert np.abs(got).max() > 1e-3
  assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_the_balance_loss_is_of_all_devices_together_and_the_same_on_each():
  """MaxText returns each device's own loss as if all had the same (out_specs=P() without a sum, check_vma=False)."""
  exchange, sharding = on_mesh('all_gather')
  layer = make_layer(exchange, {'balance': 0.5})
  x = tokens(skew=4.0)
  aux = jax.jit(lambda x: layer(x)[1])(jax.device_put(x, sharding))
  copies = [float(shard.data) for shard in aux.losses['balance'].addressable_shards]
  assert len(copies) == 8
  assert len(set(copies)) == 1

  def balance(x_td):
    """E sum_e f_e P_e (Switch, equation 4) of these tokens, f over the chosen rows."""
    logits = np.asarray(x_td, np.float64) @ np.asarray(layer.router.scorer.kernel[...], np.float64)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    chosen = np.argsort(-logits, 1)[:, :2]
    return E * (np.bincount(chosen.reshape(-1), minlength=E) / chosen.size * probs.mean(0)).sum()

  # times the coefficient, and not one plus it, as in EasyDeL
  assert copies[0] == pytest.approx(0.5 * balance(x.reshape(-1, D)), rel=1e-5)
  of_each = np.mean([balance(sequence) for sequence in x])
  assert abs(of_each - balance(x.reshape(-1, D))) > 0.1  # the test can tell them apart


def test_a_buffer_that_truncates_says_so():
  """MaxText's ragged_buffer_factor and jax-llm-examples' prefill cut the last rows off and count nothing."""
  exchange, sharding = on_mesh('ragged_all_to_all', {'buffer_factor': 0.5})
  layer = make_layer(exchange, {})
  metrics = jax.jit(lambda x: layer(x)[1].metrics)(jax.device_put(tokens(4.0), sharding))
  assert float(metrics['lost']) >= 0.5
  assert float(metrics['dropped']) == float(metrics['lost'])


CHOOSERS = {
  'the best': {'name': 'top_k'},
  'the best by sigmoids': {'name': 'top_k', 'weighting': 'sigmoid_norm'},
  'the best of the best groups': {'name': 'group_limited', 'groups': 4, 'limit': 2, 'best': 1},
  'the best while there is room': {'name': 'top_k', 'capacity_factor': 1.0, 'priority': 'score'},
  'the nearest': {'name': 'cosine'},
}


@pytest.mark.parametrize('chooser', CHOOSERS)
def test_the_bias_moves_whatever_it_is_that_chooses(chooser):
  """axlearn's TopKBiasGating with a top-k function of one's own returns before its bias update; MaxText never updated
  DeepSeek-V3's bias (its issue 2494). Here rows are counted where they are wanted, and the controller knows of no
  chooser: after one step every bias has gone against its expert's load, and after many the loads are more alike."""
  exchange, sharding = on_mesh('all_gather')
  router = {**CHOOSERS[chooser], 'k': 2, 'balance_bias': True}
  layer = MoE(D, F, E, router, losses={}, exchange=exchange, dispatch=einsum, rngs=nnx.Rngs(0))
  graph, biases, rest = nnx.split(layer, RouterBias, ...)
  x = jax.device_put(tokens() + jnp.asarray(2.0, jnp.float32), sharding)

  def step(bias_e, rate):
    layer = nnx.merge(graph, jax.tree.map(lambda _: bias_e, biases), rest)
    chosen_e = layer(x, Context(train=True))[1].stats.chosen_e
    return balance_bias(bias_e, chosen_e, rate), chosen_e

  start = jnp.zeros(E, jnp.float32)
  moved, first = jax.jit(lambda bias: step(bias, 0.5))(start)
  np.testing.assert_array_equal(np.asarray(moved), 0.5 * np.sign(first.mean() - first))
  assert first.max() > first.min()
  _, loads = jax.jit(lambda bias: jax.lax.scan(lambda b, _: step(b, 0.02), bias, length=200))(start)
  last = np.asarray(loads[-20:]).mean(0)
  assert last.std() < 0.5 * np.std(first)


def test_probabilities_of_the_balance_loss_sum_to_one_whatever_the_scores():
  """Transformers took the softmax of a softmax (its issues 45111 and 45120), Megatron the sigmoids as they are (its
  issue 1545): of even loads the loss is then not its coefficient."""
  for weighting in ('softmax_topk_norm', 'sigmoid_norm'):
    router = {'name': 'top_k', 'k': 2, 'weighting': weighting}
    layer = MoE(D, F, E, router, losses={'balance': 0.5}, dispatch=einsum, rngs=nnx.Rngs(0))
    stats = layer(4 * tokens())[1].stats
    assert float(stats.prob_e.sum()) == pytest.approx(B * S, rel=1e-5)
