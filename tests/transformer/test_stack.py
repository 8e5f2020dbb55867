import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.arrays import Context
from moejax.transformer import FFN, Attention, Block, Stack, rotation
from moejax.transformer.stack import context_of, plan_segments
from tests.thorough import thorough

D = 16


@pytest.mark.parametrize(
  ('kinds', 'expected'),
  [
    ('d', [('d', 1)]),
    ('dddd', [('d', 4)]),
    ('dmdmdm', [('dm', 3)]),
    ('dddmdddm', [('dddm', 2)]),
    ('dddmmm', [('d', 3), ('m', 3)]),
    ('dmdmd', [('d', 1), ('md', 2)]),
  ],
)
def test_kinds_are_cut_into_the_smallest_units_that_repeat(kinds, expected):
  assert [(''.join(unit), repeats) for unit, repeats in plan_segments(kinds)] == expected


@pytest.mark.parametrize('seed', range(20))
def test_a_plan_always_spells_the_kinds_it_was_made_for(seed):
  kinds = ''.join(np.random.default_rng(seed).choice(['d', 'm'], size=seed % 13 + 1))
  plan = plan_segments(kinds)
  assert ''.join(''.join(unit) * repeats for unit, repeats in plan) == kinds


def make_stack(toy_moe, kinds, dtype=jnp.float32, **options):
  def make_block(kind, rngs):
    make = dict(dtype=dtype, rngs=rngs)
    attention = Attention(D, 2, 1, 8, causal=True, **make)
    if kind == 'm':
      return Block(D, attention=attention, moe=toy_moe(D)(rngs), **make)
    return Block(D, attention=attention, ffn=FFN(D, 24, **make), **make)

  return Stack.create(make_block, kinds, rngs=nnx.Rngs(0), **options)


def run_unstacked(blocks, x, context, turn):
  """The definition: one layer after the other."""
  stats = []
  for index, block in enumerate(blocks):
    x, block_stats, state = block(x, context_of(jnp.int32(index), context), turn)
    context = dataclasses.replace(context, state=state)
    stats += block_stats
  return x, jax.tree.map(lambda *a: jnp.stack(a), *stats)


@pytest.fixture
def inputs(rng):
  x = jnp.asarray(rng.normal(size=(2, 6, D)))  # float64 in tests that use x64
  context = Context(mask=jnp.asarray(rng.random((2, 6)) < 0.8), rng=jax.random.key(3))
  return x, context, rotation(jnp.arange(6, dtype=jnp.int32)[None, :], 8)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('kinds', ['dmdm', thorough('ddmm'), 'dmmd'])
def test_a_stack_equals_a_loop_over_its_layers_in_value_stats_and_gradient(kinds, toy_moe, inputs):
  stack = make_stack(toy_moe, kinds, dtype=jnp.float64)
  x, context, turn = inputs
  graph, params, rest = nnx.split(stack, nnx.Param, ...)

  def scanned(params, x):
    y, stats = nnx.merge(graph, params, rest)(x, context, turn)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(stats.prob_e)), (y, stats)

  def looped(params, x):
    y, stats = run_unstacked(nnx.merge(graph, params, rest).unstack(), x, context, turn)
    return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(stats.prob_e)), (y, stats)

  grad = lambda f: jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(params, x)
  (grads, (y, stats)), (grads_loop, (y_loop, stats_loop)) = grad(scanned), grad(looped)
  np.testing.assert_allclose(y, y_loop, atol=1e-11)
  assert stats.prob_e.shape == (kinds.count('m'), 3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), stats, stats_loop)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), grads, grads_loop)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('options', [dict(remat='full'), dict(remat='dots'), dict(unroll=4)])
def test_computing_again_or_unrolled_gives_the_same_gradients(options, toy_moe, inputs):
  x, context, turn = inputs

  def gradients(**options):
    stack = make_stack(toy_moe, 'dmdm', dtype=jnp.float64, **options)
    graph, params, rest = nnx.split(stack, nnx.Param, ...)

    def loss(params):
      y, stats = nnx.merge(graph, params, rest)(x, context, turn)
      return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.sin(stats.prob_e))

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), gradients(**options), gradients()
  )


def test_every_layer_draws_noise_of_its_own(toy_moe, inputs):
  x, context, turn = inputs
  stack = make_stack(toy_moe, 'm')
  block = stack.unstack()[0]
  block.attention.out.weight[...] = jnp.zeros((D, D))
  block.moe.experts[...] = jnp.zeros((3, D, D))
  # Now the block is the identity, and every layer sees the same.
  twice = Stack.of([block, block])
  first, second = twice(x, Context(), turn)[1].prob_e
  np.testing.assert_array_equal(first, second)
  first, second = twice(x, context, turn)[1].prob_e
  assert np.abs(first - second).max() > 1e-3


def test_layers_start_from_different_weights(toy_moe):
  up = [np.asarray(block.ffn.up.weight[...]) for block in make_stack(toy_moe, 'ddd').unstack()]
  assert np.abs(up[0] - up[1]).max() > 0.1
  assert np.abs(up[1] - up[2]).max() > 0.1


def test_a_router_bias_is_stacked_and_read_by_its_own_layer(toy_moe, inputs):
  x, _, turn = inputs
  stack = make_stack(toy_moe, 'dmdm')
  bias = stack.segments[0].blocks[1].moe.bias
  assert bias[...].shape == (2, 3)
  bias[...] = jnp.array([[0.0, 0.0, 0.0], [-50.0, 50.0, -50.0]])
  _, stats = stack(x, Context(), turn)
  np.testing.assert_allclose(stats.prob_e[1], [0, 12, 0], atol=1e-5)
  assert np.min(stats.prob_e[0]) > 0.1


def test_stacking_unstacked_layers_again_gives_the_same_function(toy_moe, inputs):
  stack = make_stack(toy_moe, 'dmmdm')
  blocks = stack.unstack()
  np.testing.assert_array_equal(Stack.of(blocks)(*inputs)[0], stack(*inputs)[0])
  dropped = Stack.of(blocks[:2])
  np.testing.assert_allclose(dropped(*inputs)[0], run_unstacked(blocks[:2], *inputs)[0], atol=1e-6)


def test_the_compiled_program_does_not_grow_with_depth(toy_moe, inputs):
  x, context, turn = inputs

  def program(kinds):
    graph, state = nnx.split(make_stack(toy_moe, kinds))

    def loss(state, x):
      return jnp.sum(nnx.merge(graph, state)(x, context, turn)[0])

    text = jax.jit(jax.grad(loss)).lower(state, x).as_text()
    counts = {op: len(re.findall(rf'stablehlo\.{op}\b', text)) for op in ('while', 'dot_general')}
    return counts, text.count('\n')

  counts, lines = program('dm' * 2)
  assert counts['while'] >= 2  # forward and backward
  deep_counts, deep_lines = program('dm' * 6)
  assert deep_counts == counts
  assert deep_lines == lines


def test_an_unknown_remat_is_refused_with_the_names(toy_moe):
  with pytest.raises(ValueError, match=r"remat='some'.*full"):
    make_stack(toy_moe, 'd', remat='some')


def test_a_stack_without_layers_is_refused(toy_moe):
  with pytest.raises(ValueError, match='at least one layer'):
    make_stack(toy_moe, '')


def test_a_block_with_two_feed_forward_parts_is_refused(toy_moe):
  rngs = nnx.Rngs(0)
  attention = Attention(D, 2, 1, 8, causal=True, rngs=rngs)
  with pytest.raises(ValueError, match='exactly one'):
    Block(D, attention=attention, ffn=FFN(D, 8, rngs=rngs), moe=toy_moe(D)(rngs), rngs=rngs)
