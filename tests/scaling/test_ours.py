"""What our models have, against their own parameters and against the compiler's count of a whole training step.

XLA counts the body of a loop once and nothing inside a kernel, so the compared models are unrolled, and mixtures are
dispatched by einsum: there every expert works on every token, which the count is told, and adds a product of weights
and outputs, which is no model FLOP and is added here by hand.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import common
from experiments.settings import Settings
from moejax.moe.dispatch import einsum
from moejax.moe.kinds import make_layer
from moejax.scaling.ours import model_cost
from moejax.transformer import Decoder, count_params

V, B, S = 2048, 2, 128


def settings(**change):
  config = common.get_config()
  config.model.moe.losses = {}
  config.update_from_flattened_dict({f'model.{key}': value for key, value in change.items()})
  return Settings.from_config(config).model


def mixture(model, rngs):
  return make_layer(
    model.moe.kind,
    model.d_model,
    model.moe.d_ff,
    model.moe.num_experts,
    model.moe.router,
    options=model.moe.options,
    granularity=model.moe.granularity,
    num_shared=model.moe.num_shared,
    gated=model.gated,
    dispatch=einsum,
    losses={},
    rngs=rngs,
  )


def shape_of(model):
  """A mixture of the model, without its numbers."""
  return jax.eval_shape(lambda key: mixture(model, nnx.Rngs(key)), jax.random.key(0))


def make(model):
  moe = functools.partial(mixture, model)
  return lambda key: Decoder(
    V,
    model.d_model,
    model.num_layers,
    model.num_heads,
    model.d_ff,
    num_kv_heads=model.num_kv_heads,
    head_dim=model.head_dim,
    qk_norm=model.qk_norm,
    tie_embeddings=model.tie_embeddings,
    gated=model.gated,
    moe=moe if model.moe_layers else None,
    moe_layers=model.moe_layers,
    unroll=model.num_layers,
    rngs=nnx.Rngs(key),
  )


def parameters(model):
  state = jax.eval_shape(lambda key: nnx.state(make(model)(key), nnx.Param), jax.random.key(0))
  return count_params(nnx.to_pure_dict(state))


cost = functools.partial(model_cost, vocab_size=V, sequence_length=S)


def compiled_flops(model, rows=B):
  """XLA's count of the loss and its gradient on so many sequences, arrays never made."""
  graph, state = nnx.split(jax.eval_shape(make(model), jax.random.key(0)))
  tokens = jax.ShapeDtypeStruct((rows, S), jnp.int32)

  def loss(state, tokens):
    logits = nnx.merge(graph, state)(tokens)[0]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1))

  program = jax.jit(jax.value_and_grad(loss)).lower(state, tokens).compile()
  return program.cost_analysis()['flops']


DENSE = {'d_model': 512, 'num_layers': 2, 'num_heads': 4, 'd_ff': 2048, 'moe.layers': 'none'}


@pytest.mark.parametrize('change', [{}, {'gated': False, 'num_kv_heads': 2}])
def test_a_dense_model_costs_what_the_compiler_counts_within_3_percent(change):
  model = settings(**{**DENSE, **change})
  ours = cost(model, parameters(model)).flops_per_token * B * S
  assert compiled_flops(model) == pytest.approx(ours, rel=0.03)


def test_a_mixture_costs_what_the_compiler_counts_within_3_percent():
  change = {'moe.layers': '1', 'moe.num_experts': 4, 'moe.d_ff': 1024, 'moe.num_shared': 1}
  model = settings(**{**DENSE, **change})
  ours = cost(model, parameters(model), choices=4).flops_per_token + 3 * 2 * 4 * 512
  counted = compiled_flops(model)
  assert counted == pytest.approx(ours * B * S, rel=0.03)
  sparse = cost(model, parameters(model), choices=2).flops_per_token
  assert counted > 1.1 * sparse * B * S  # the control: two experts a token are less


E, D, F = 4, 512, 1024
OWN = {'moe.num_experts': E, 'moe.d_ff': F}  # for kinds with a router of their own
WIDE = OWN | {'moe.router': {'name': 'top_k', 'k': E}}
OTHERS = {
  # what einsum, or the kind itself, multiplies for a token beside its model FLOPs: weights and outputs of all experts
  'residual': (WIDE, 2 * E * D),
  'multi_head': (WIDE | {'moe.options': {'heads': 2}}, 2 * E * D),
  'cartesian': (WIDE, 2 * 2 * E * D),
  'deep': (OWN, 2 * E * (D + F)),
  'nested': (OWN | {'moe.options': {'effective': 0.9}, 'moe.d_ff': 4096}, 0),
  'peer': (
    {'moe.num_experts': 4096, 'moe.options': {'heads': 8, 'k': 8, 'query_width': 256}},
    0,
  ),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_other_kinds_of_mixtures_cost_what_the_compiler_counts_within_3_percent(kind):
  """One sequence: the neurons of PEER are a loop over chunks of 128 tokens."""
  change, beside = OTHERS[kind]
  model = settings(**{**DENSE, 'moe.layers': '1', 'moe.kind': kind, **change})
  layer, counts = shape_of(model), parameters(model)
  found = cost(model, counts, layer=layer)
  counted = compiled_flops(model, rows=1)
  assert counted == pytest.approx((found.flops_per_token + 3 * beside) * S, rel=0.03)
  own = 3 * sum(layer.flops_per_token(S).values())
  assert own > 0.1 * found.flops_per_token  # the control: without the mixture it is far less
  idle = counts['moe/experts'] * (1 - layer.active_share(S))
  assert found.N - found.N_active == pytest.approx(idle)


def test_a_kind_that_must_be_asked_is_refused_without_its_layer():
  model = settings(**{**DENSE, 'moe.kind': 'peer', 'moe.layers': '1', 'moe.num_experts': 16})
  with pytest.raises(ValueError, match="layer=None with model.moe.kind='peer'"):
    cost(model, {'embed': 1, 'total': 2}, choices=2)


def test_parameters_counted_by_hand():
  change = {'moe.layers': 'every_2', 'moe.num_experts': 8, 'moe.granularity': 4, 'qk_norm': False}
  model = settings(d_model=64, num_layers=4, num_heads=2, d_ff=128, **change)
  found = cost(model, parameters(model), choices=8)
  attention, dense, bank, norms = 4 * 4 * 64**2, 2 * 3 * 64 * 128, 2 * 8 * 3 * 64 * 128, 9 * 64
  assert found.embedding == V * 64  # tied
  assert found.router == 2 * 64 * 32
  assert found.N == attention + dense + bank + norms
  assert found.N_active == attention + dense + bank * 8 / 32 + norms


def test_granularity_changes_the_router_and_nothing_else():
  costs = []
  for grain in (1, 4):
    change = {
      'moe.num_experts': 8,
      'moe.granularity': grain,
      'moe.router': {'name': 'top_k', 'k': 1},
    }
    model = settings(d_model=64, num_layers=2, num_heads=2, d_ff=128, **change)
    costs.append(cost(model, parameters(model), choices=grain))
  one, four = costs
  assert (one.N, one.N_active, one.embedding) == (four.N, four.N_active, four.embedding)
  assert four.router == 4 * one.router
  assert four.flops_per_token - one.flops_per_token == 3 * 2 * 2 * 64 * (32 - 8)


def test_more_choices_than_experts_use_all_parameters():
  model = settings(d_model=64, num_layers=2, num_heads=2, d_ff=128)
  found = cost(model, parameters(model), choices=20)
  assert found.N_active == found.N


def test_a_model_that_has_no_tokens_or_no_choices_is_refused():
  model = settings(d_model=64, num_layers=2, num_heads=2, d_ff=128)
  counts = {'embed': 1, 'total': 2}
  with pytest.raises(ValueError, match="kind='vit'"):
    cost(dataclasses.replace(model, kind='vit'), counts, choices=2)
  with pytest.raises(ValueError, match='choices=0.0 of a mixture'):
    cost(model, counts)
