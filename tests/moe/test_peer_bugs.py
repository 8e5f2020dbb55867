"""Bugs that other code bases shipped in their expert-parallel paths, each as a test of ours.

Others of the kind: uncounted truncation (tests/moe/test_exchange.py), experts with FSDP that could not be combined
(tests/test_every_exchange.py, meshes of three axes), auxiliary gradients that shrink under accumulation
(tests/experiments/test_step.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import MoE
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.dispatch import einsum
from moejax.moe.exchange import make_exchange, single

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
