"""The table of all routers, and how tests make, run and compare the layers of its rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import Context, MoE, oracle
from moejax.routers import ROUTERS, RouterBias

B, S, D, E, F, V = 2, 8, 8, 4, 6, 16

ROWS = {
  'top_k': {'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk_norm'},
  'top_1': {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk'},
  'sigmoid': {'name': 'top_k', 'k': 1, 'weighting': 'sigmoid'},
  'stop_gradient': {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk_norm_sg'},
  'unweighted': {'name': 'top_k', 'k': 2, 'weighting': 'unweighted'},
  'noisy': {'name': 'top_k', 'k': 2, 'noise_std': 1.0, 'jitter': 0.1},
  'bias': {
    'name': 'top_k',
    'k': 2,
    'weighting': 'sigmoid_norm',
    'route_scale': 2.5,
    'balance_bias': True,
  },
  'token_major': {'name': 'top_k', 'capacity_factor': 0.6, 'weighting': 'topk_softmax'},
  'token_major_sequence': {'name': 'top_k', 'capacity_factor': 0.6, 'capacity_group': 'sequence'},
  'choice_major': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'choice_major'},
  'renormalised': {'name': 'top_k', 'capacity_factor': 0.6, 'renorm_after_drop': True},
  'batch_prioritised': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'score'},
  'random_priority': {'name': 'top_k', 'capacity_factor': 0.6, 'priority': 'random'},
  'threshold': {
    'name': 'gshard',
    'second_policy': 'threshold',
    'second_threshold': 0.4,
    'capacity_factor': 0.6,
    'eval_capacity_factor': 0.6,
  },
  'switch': {'name': 'switch', 'capacity_factor': 0.6, 'eval_capacity_factor': 0.6},
  'gshard': {'name': 'gshard', 'capacity_factor': 0.6, 'eval_capacity_factor': 0.6},
  'expert_choice': {'name': 'expert_choice', 'capacity_factor': 1.5},
  'expert_choice_batch': {'name': 'expert_choice', 'group': 'batch'},
  'expert_choice_position': {'name': 'expert_choice', 'group': 'position'},
  'expert_choice_tokens': {'name': 'expert_choice', 'softmax_over': 'tokens', 'noise_std': 1.0},
  'expert_choice_capped': {'name': 'expert_choice', 'group': 'batch', 'cap': 2},
  'expert_choice_position_pairs': {
    'name': 'expert_choice',
    'group': 'position',
    'group_size': 2,
  },
  'soft': {'name': 'soft', 'slots': 2},
  'soft_combine': {'name': 'soft', 'slots': 2, 'mixing': 'learned_combine'},
  'soft_dispatch': {'name': 'soft', 'slots': 2, 'mixing': 'learned_dispatch'},
  'soft_uniform': {'name': 'soft', 'slots': 2, 'mixing': 'uniform'},
  'soft_identity': {'name': 'soft', 'slots': 2, 'mixing': 'identity'},
  'dense': {'name': 'dense'},
  'hash': {'name': 'hash', 'of': 'bigram'},
  'sinkhorn': {'name': 'sinkhorn'},
  'sinkhorn_expert_choice': {'name': 'sinkhorn_expert_choice', 'capacity_factor': 1.5},
  'sparse_expert_choice': {'name': 'sparse_expert_choice', 'capacity_factor': 1.5},
  'base': {'name': 'base'},
  'noisy_top_k': {'name': 'noisy_top_k', 'k': 2},
  'cosine': {'name': 'cosine', 'width': 3},
  'group_limited': {'name': 'group_limited', 'groups': 2, 'limit': 1},
  'modified_softmax': {'name': 'modified_softmax'},
  'mixture_of_tokens': {'name': 'mixture_of_tokens', 'group_size': 2, 'slots': 2},
  'thor': {'name': 'thor'},
  'smoe_dropout': {'name': 'smoe_dropout', 'k_min': 1, 'k_max': 3},
  'ewa': {'name': 'ewa'},
  'mask_moe': {'name': 'mask_moe', 'k': 2, 'visible': 3, 'counts': tuple(range(V, 0, -1))},
  'vmoe': {'name': 'vmoe', 'capacity_factor': 0.6},
  'top_p': {'name': 'top_p', 'p': 0.5, 'eval_p': 0.3},
  'top_p_renormalised': {'name': 'top_p', 'p': 0.5, 'renorm': True, 'max_k': 3},
  'ada_moe': {'name': 'ada_moe', 'k': 3, 'nulls': 3},
  'dense_to_sparse': {'name': 'dense_to_sparse', 'threshold': 0.1},
  'dense_to_sparse_plain': {
    'name': 'dense_to_sparse',
    'tau_max': 1.0,
    'tau_min': 0.1,
    'decay': 'exponential',
    'threshold': 0.1,
    'tempered': False,
  },
  'ds_moe': {'name': 'ds_moe', 'eval_k': 2},
  'ds_moe_threshold': {'name': 'ds_moe', 'eval_threshold': 0.3},
  'smile': {'name': 'smile', 'nodes': 2},
  'locmoe': {'name': 'locmoe', 'nodes': 2},
  'moec': {'name': 'moec', 'width': 3},
  'rmoe': {'name': 'rmoe', 'width': 3},
  'gating_residual': {'name': 'gating_residual'},
  'pre_gated': {'name': 'pre_gated'},
  'read_me': {'name': 'read_me'},
  'm3vit': {'name': 'm3vit'},
  'm3vit_embedding': {'name': 'm3vit', 'gate': 'embedding', 'width': 3, 'noise_std': 0.0},
  'family': {'name': 'family'},
  'speech_moe': {'name': 'speech_moe', 'width': E},
  'time_moe': {'name': 'time_moe', 'width': 4, 'noise_std': 0.1},
  'space_moe': {'name': 'space_moe', 'width': E},
  'image': {'name': 'image'},
  'spatial': {'name': 'spatial', 'positions': 8},
  'kamoe': {'name': 'kamoe', 'width': 6, 'cells': 3},
}

ROWS |= {name: {'name': name} for name in ROUTERS if ':' in name}  # pytest --router module:function


ONE_OF_EACH = tuple(row for row, options in ROWS.items() if row == options['name'])
"""The row of each router that is called as it."""

USUAL = (*ONE_OF_EACH, 'bias', 'token_major', 'choice_major', 'batch_prioritised')
USUAL = (*USUAL, 'expert_choice_batch', 'expert_choice_position')
"""Rows of the default suite: the others are the same routers with further options."""

SCORERS = ('rmoe', 'gating_residual', 'pre_gated', 'read_me', 'm3vit', 'm3vit_embedding', 'family')
SCORERS = (*SCORERS, 'speech_moe', 'time_moe', 'image', 'spatial', 'kamoe')
"""Rows that are `top_k` or `dense` with other logits: what is done with these is tested there in all dispatches."""


LOSSES = {'balance': 1.0, 'z': 1.0, 'importance': 1.0, 'sequence_balance': 1.0}


def make_layer(row, seed=0, **options) -> MoE:
  """A layer of one's own: its parameters are drawn once for all who ask for the same, which is most of the work."""
  graph, state = drawn_layer(row, seed, jax.config.jax_enable_x64, **options)
  return nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))  # variables of its own


@functools.cache
def drawn_layer(row, seed, x64, **options) -> tuple[nnx.GraphDef, nnx.State]:
  """Graph and state of a layer; with 64 bits its numbers are drawn otherwise."""
  layer = MoE(D, F, E, dict(ROWS[row]), losses=LOSSES, rngs=nnx.Rngs(seed), **options)
  if layer.router.bias is not None:
    layer.router.bias = RouterBias(jnp.array([0.3, -0.2, 0.0, 0.1], jnp.float32))
  return nnx.split(layer)


@functools.cache
def unchanged_layer(row) -> MoE:
  """The layer, for tests that do not write to it."""
  return make_layer(row)


@functools.cache
def tokens(seed=1, shape=(B, S, D), dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.cache
def ids(seed=5, shape=(B, S)):
  return jax.random.randint(jax.random.key(seed), shape, 0, V, jnp.int32)


def context(train=True, *, token_ids=None, **fields) -> Context:
  """All that a router may look at; what is known of a whole sequence is a function of its first ids.

  There is a mask unless a test asks for none: programs with and without one are not the same.
  """
  known = usual(jax.config.jax_enable_x64) if token_ids is None else known_of(token_ids)
  return Context(**known | {'train': train} | fields)


@functools.cache
def usual(x64) -> dict:
  """What is known of the usual ids, computed once, also where it is first asked for in a program."""
  with jax.ensure_compile_time_eval():
    return known_of(ids())


def known_of(token_ids) -> dict:
  """The fields of a context of these ids."""
  table = jax.random.normal(jax.random.key(8), (V, E))
  known = {'token_ids': token_ids, 'rng': jax.random.key(7), 'progress': jnp.float32(0.4)}
  first = token_ids[:, :3]
  known['shared'] = {'read_me': table[token_ids]}
  known |= {'task': first[:, 0] % 2, 'time': first[:, 0] / V, 'domain': table[first[:, 0]]}
  known |= {'text': table[first], 'mask': jnp.ones(token_ids.shape, bool)}
  maps = jax.random.uniform(jax.random.key(9), (V, token_ids.shape[1]))
  return known | {'maps': maps[first]}


def through(layer, x, context, apply):
  """The sum of `apply(x, plan)` over the layer's decisions: one, or with a state those of two layers in a row."""
  graph, state = nnx.split(layer.router)
  scores, plan = route(graph, state, x, context)
  if not layer.router.flags.has_state:
    return apply(x, plan)
  above = dataclasses.replace(context, state=scores.state)
  return apply(x, plan) + apply(x, route(graph, state, x, above)[1])


@functools.partial(jax.jit, static_argnums=0)
def route(graph, state, x, context):
  """What a router makes of these tokens, as a program of its own."""
  return nnx.merge(graph, state).route(x, context)


@functools.partial(jax.jit, static_argnums=0)
def by_definition(graph, state, x, plan):
  """Outputs of these experts: what the oracle sees of a router is its plan, so one program serves many of them."""
  return oracle.moe(x, plan, nnx.merge(graph, state))


def by_layer(layer, x, context):
  y, aux = layer(x, context)
  if not layer.router.flags.has_state:
    return y, aux.losses, aux.stats
  above, second = layer(x, dataclasses.replace(context, state=aux.state))
  stats = dataclasses.replace(second.stats, kept_e=aux.stats.kept_e + second.stats.kept_e)
  return y + above, second.losses, stats


def by_oracle(layer, x, context):
  """The outputs by definition; losses and stats have golden values instead (tests/moe/test_golden.py)."""
  apply = functools.partial(by_definition, *nnx.split(layer.experts))
  return through(layer, x, context, apply), {}, None


@functools.cache
def program(row, apply=by_layer, gradient=True, **options):
  """`(layer, x, context) -> (y, losses, stats, gradients)`, compiled once for all properties of a row.

  Gradients are those of a fixed random projection of y, by the parameters and by x. The oracle is not one program: its
  parts are.
  """
  graph = nnx.split(make_layer(row, **options), nnx.Param, ...)[0]

  def scalar(params, x, rest, context):
    y, losses, stats = apply(nnx.merge(graph, params, rest), x, context)
    target = jax.random.normal(jax.random.key(3), y.shape, y.dtype)
    return (y * target).sum(), (y, losses, stats)

  def forward(params, x, rest, context):
    return *scalar(params, x, rest, context)[1], None

  def both(params, x, rest, context):
    out, gradients = jax.grad(scalar, (0, 1), has_aux=True)(params, x, rest, context)[::-1]
    return *out, (nnx.to_pure_dict(gradients[0]), gradients[1])

  run = both if gradient else forward
  compiled = run if apply is by_oracle else jax.jit(run)

  def call(layer, x, context):
    _, params, rest = nnx.split(layer, nnx.Param, ...)
    return compiled(params, x, rest, context)

  return call


def outputs(row, x, context) -> jax.Array:
  return program(row, gradient=False)(unchanged_layer(row), x, context)[0]


@functools.cache
def draws():
  """20 draws of four sequences, and what is asked of them: the arguments of `promised_outputs`.

  What was changed -> x `[20, 4, 8, D]`, and where a router is in its life -> contexts with a leading axis of as many.
  """

  def draw(seed):
    seeds = range(seed, seed + 20)
    x = jnp.stack([tokens(seed, (4, 8, D)) for seed in seeds])
    return x, jnp.stack([ids(seed, (4, 8)) for seed in seeds])

  drawn, new = draw(100), draw(200)
  later = [a.at[:, 1, 4:].set(b[:, 1, 4:]) for a, b in zip(drawn, new, strict=True)]
  others = [b.at[:, 2].set(a[:, 2]) for a, b in zip(drawn, new, strict=True)]
  of = lambda **options: jax.vmap(lambda ids: context(token_ids=ids, **options))
  lives = {'train': of(), 'eval': of(train=False), 'without a key': of(train=False, rng=None)}
  return {
    what: (x, {life: of(ids) for life, of in lives.items()})
    for what, (x, ids) in {'nothing': drawn, 'later': later, 'others': others}.items()
  }


@functools.cache
def promise_program(row):
  """`(x, contexts of each life) -> outputs of each`, with a leading axis of draws; one program for all lives."""
  graph, state = nnx.split(unchanged_layer(row))

  @jax.jit
  def run(state, x, contexts):
    layer = nnx.merge(graph, state)
    one = lambda drawn: {life: layer(drawn[0], known)[0] for life, known in drawn[1].items()}
    return jax.lax.map(one, (x, contexts))

  return lambda *drawn: jax.tree.map(np.asarray, run(state, *drawn))


@functools.cache
def promised_outputs(row):
  """What was changed -> life -> outputs `[20, 4, 8, D]`."""
  return {what: promise_program(row)(*drawn) for what, drawn in draws().items()}


@functools.cache
def plan_of(row):
  """What the router makes of the usual tokens."""
  return route(*nnx.split(unchanged_layer(row).router), tokens(), context())[1]


@functools.cache
def rows_program(dispatch):
  """`(experts, x [T, D], rows) -> y, gradients by all three`: what a dispatch sees of a router is its rows.

  Compiled once for all routers whose rows are as many. Gradients are those of a fixed random projection of y.
  """

  def scalar(state, x, weight, rows, graph):
    y = dispatch(x, dataclasses.replace(rows, weight=weight), nnx.merge(graph, state))
    return (y * jax.random.normal(jax.random.key(3), y.shape, y.dtype)).sum(), y

  run = jax.jit(jax.grad(scalar, (0, 1, 2), has_aux=True), static_argnums=4)

  def call(experts, x, rows):
    graph, state = nnx.split(experts)
    return run(state, x, rows.weight, rows, graph)

  return call


def widen(layer: MoE) -> MoE:
  graph, state = nnx.split(layer)

  def wide(leaf):
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

  return nnx.merge(graph, jax.tree.map(wide, state))


def rotated(layer: MoE, names=None) -> MoE:
  """The same layer with every expert's weights, or those of these names, moved to its neighbour."""
  weights = nnx.to_pure_dict(nnx.split(layer.experts)[1])
  moved = {n: jnp.roll(w, 1, 0) if names is None or n in names else w for n, w in weights.items()}
  nnx.update(layer.experts, moved)
  return layer


def check_close(got, want, tolerance):
  """Largest difference, relative to the largest entry of `want`."""
  for pair in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = (np.asarray(leaf, np.float64) for leaf in pair)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)
