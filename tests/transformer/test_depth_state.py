"""What routers carry from layer to layer: a stack equals its layers one by one, and the state is what papers say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE, make_router
from moejax.moe.momentum import MOMENTA, Robust, make_momentum
from moejax.placement.routing_trace import routing_trace
from moejax.routers import make_shared
from moejax.routers.rmoe import gru
from moejax.transformer import FFN, Attention, Block, Decoder, Depth, Stack
from moejax.transformer.stack import context_of
from tests.thorough import and_thorough

D, E = 8, 3
CASES = {  # router, momentum, layers ('d' without a mixture), remat
  'rmoe': ({'name': 'rmoe', 'width': 4, 'share_cell': True}, 'heavy_ball', 'mmdm', 'full'),
  'gating_residual': ({'name': 'gating_residual'}, 'adam', 'mdmd', 'none'),
  'pre_gated': ({'name': 'pre_gated'}, 'robust', 'mdmd', 'none'),
}


def make_stack(name):
  router, momentum, kinds, remat = CASES[name]

  def make_block(kind, rngs):
    attention = Attention(D, 2, 1, 4, causal=True, dtype=jnp.float64, rngs=rngs)
    make = {'attention': attention, 'dtype': jnp.float64, 'rngs': rngs}
    if kind == 'd':
      return Block(D, ffn=FFN(D, 8, dtype=jnp.float64, rngs=rngs), **make)
    moe = MoE(D, 6, E, router, momentum=momentum, dtype=jnp.float64, losses={}, rngs=rngs)
    return Block(D, moe=moe, **make)

  shared = lambda rngs: make_shared(d_model=D, num_experts=E, rngs=rngs, **router)
  stack = Stack.create(make_block, kinds, remat=remat, make_shared=shared, rngs=nnx.Rngs(0))
  graph, state = nnx.split(stack)
  return nnx.merge(graph, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))


def one_by_one(stack, x, context):
  """The definition: a loop over layers that hands the state on."""
  context = stack.prepare(x, context)
  for layer, block in enumerate(stack.unstack()):
    x, _, state = block(x, context_of(jnp.int32(layer), context))
    context = dataclasses.replace(context, state=state)
  return x


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('name', and_thorough(['rmoe', 'gating_residual'], ['pre_gated']))
def test_a_stack_carries_the_state_as_a_loop_over_its_layers_does(name, rng):
  """In value and in gradient, across segments, over layers without a mixture, and computed again in the backward."""
  x = jnp.asarray(rng.normal(size=(2, 4, D)))
  context = Context(mask=jnp.array([[True] * 4, [True] * 3 + [False]]))

  def run(forward):
    graph, params, rest = nnx.split(make_stack(name), nnx.Param, ...)
    loss = lambda params: jnp.sin(forward(nnx.merge(graph, params, rest), x, context)).sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    return value, nnx.to_pure_dict(gradient)

  value, gradient = run(one_by_one)
  got = run(lambda stack, x, context: stack(x, context)[0])
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), got, (value, gradient))
  moved = {
    jax.tree_util.keystr(path): float(jnp.abs(leaf).max())
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
    if 'scorer' in jax.tree_util.keystr(path) or 'shared' in jax.tree_util.keystr(path)
  }
  assert moved
  assert min(moved.values()) > 1e-7, moved


def test_the_last_layer_moves_what_the_first_one_remembers():
  """Two recurrent layers: the second one's logits have a gradient in the first one's projection, unless detached."""

  def gradient(detach):
    first, second = (
      make_router('rmoe', d_model=D, num_experts=E, width=4, detach=detach, rngs=nnx.Rngs(seed))
      for seed in (0, 1)
    )
    x = jax.random.normal(jax.random.key(2), (1, 3, D))
    graph, params = nnx.split(first)

    def loss(params):
      state = nnx.merge(graph, params).scores(x, Context()).state
      return (second.scores(x, Context(state=state)).logits ** 2).sum()

    return float(jnp.abs(jax.grad(loss)(params).scorer.project[...]).max())

  assert gradient(detach=False) > 1e-4
  assert gradient(detach=True) == 0


def test_the_recurrent_cell_has_the_published_value():
  """All weights 1, offsets 0, input 1, state 0.5: 0.570642, the reset gate on the product (torch's GRUCell)."""
  cell = {'into': jnp.ones((1, 3)), 'over': jnp.ones((1, 3))}
  cell |= {'offset': jnp.zeros(3), 'over_offset': jnp.zeros(3)}
  assert float(gru(cell, jnp.ones((1, 1)), jnp.full((1, 1), 0.5))[0, 0]) == pytest.approx(
    0.570642, abs=1e-6
  )


def test_momentum_is_the_geometric_sum_of_the_steps():
  """Steps 1, 2, -1 with mu 0.7: 0.89 is left, and the tokens have moved by 4.59 (the paper's sign: -4.59)."""
  ball = make_momentum('heavy_ball')
  x, state = 0.0, ball.initial_state((1, 1, 1), jnp.float32)
  for step in (1.0, 2.0, -1.0):
    y, state = ball(jnp.full((1, 1, 1), step), state)
    x += float(y[0, 0, 0])
  assert float(y[0, 0, 0]) == pytest.approx(0.89, abs=1e-6)
  assert x == pytest.approx(1 + (0.7 + 2) + 0.89, abs=1e-6)


def test_adam_over_depth_by_hand():
  adam = make_momentum({'name': 'adam', 'gamma': 0.5})
  state = adam.initial_state((1, 1, 1), jnp.float32)
  p = v = 0.0
  for step in (1.0, -3.0):
    y, state = adam(jnp.full((1, 1, 1), step), state)
    p, v = 0.9 * p + 0.1 * step, 0.999 * v + 0.001 * step**2
    assert float(y[0, 0, 0]) == pytest.approx(0.5 * p / (v + 1e-8) ** 0.5, rel=1e-5)
  sign = make_momentum({'name': 'adam', 'b1': 0.0, 'b2': 0.0})
  y, _ = sign(jnp.array([[[2.0, -0.1]]]), sign.initial_state((1, 1, 2), jnp.float32))
  np.testing.assert_allclose(y[0, 0], [1, -1], atol=1e-5)


def test_robust_momentum_is_its_difference_equation():
  """`x+ = x + mu (x - x-) + gamma u(y)`, `y = x + alpha (x - x-)`, on u(x) = -x (Cyrus et al. 2018, equation 5)."""
  rho, kappa = 0.5, 3.0
  mu = kappa * rho**3 / (kappa - 1)
  gamma = kappa * (1 - rho) ** 2 * (1 + rho)
  alpha = rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho))
  before, now, robust = 2.0, 2.0, Robust(rho, kappa)
  x, state = jnp.full((1, 1, 1), 2.0), robust.initial_state((1, 1, 1), jnp.float32)
  for _ in range(4):
    ahead = now + alpha * (now - before)
    before, now = now, now + mu * (now - before) - gamma * ahead
    y, state = robust(-robust.reads(x, state), state)
    x = x + y
    assert float(x[0, 0, 0]) == pytest.approx(now, rel=1e-5)


def test_without_memory_momentum_is_the_plain_layer():
  make = functools.partial(MoE, D, 6, E, rngs=nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(1), (2, 3, D))
  plain = MoE(D, 6, E, rngs=nnx.Rngs(0))(x)[0]
  still = make(momentum={'name': 'heavy_ball', 'mu': 0.0})(x)[0]
  np.testing.assert_array_equal(plain, still)
  with pytest.raises(ValueError, match="name='nesterov': accepted are 'heavy_ball'"):
    make_momentum('nesterov')
  with pytest.raises(ValueError, match='kappa=1: accepted are numbers above 1'):
    make_momentum({'name': 'robust', 'kappa': 1})
  with pytest.raises(ValueError, match="option 'nu' of momentum 'adam'"):
    make_momentum({'name': 'adam', 'nu': 1})
  assert set(MOMENTA) == {'heavy_ball', 'adam', 'robust'}


def decoder(router, layers):
  moe = lambda rngs: MoE(D, 6, E, router, losses={}, rngs=rngs)
  shared = lambda rngs: make_shared(d_model=D, num_experts=E, rngs=rngs, **router)
  moe_layers = tuple(range(layers))
  return Decoder(
    16, D, layers, 2, 12, moe=moe, moe_layers=moe_layers, moe_shared=shared, rngs=nnx.Rngs(0)
  )


def test_a_router_apart_from_the_layers_chooses_alike_in_all_and_sees_no_later_token():
  graph, params = nnx.split(decoder({'name': 'read_me', 'width': 4}, layers=2))
  tokens = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)

  @jax.jit
  def run(params, tokens):
    model = nnx.merge(graph, params)
    return (model(tokens)[0] ** 2).sum(), routing_trace(model, tokens)

  gradient, (first, second) = jax.grad(run, has_aux=True)(params, tokens)
  np.testing.assert_array_equal(first.expert, second.expert)
  assert len(set(np.asarray(first.expert).tolist())) > 1
  other = run(params, tokens.at[:, 4:].set(15))[1][0]
  np.testing.assert_allclose(
    first.weight.reshape(2, 6)[:, :4], other.weight.reshape(2, 6)[:, :4], atol=1e-6
  )
  assert not np.allclose(first.weight.reshape(2, 6)[:, 4:], other.weight.reshape(2, 6)[:, 4:])
  assert float(jnp.abs(gradient.stack.shared.kernel[...]).max()) > 1e-6


def test_what_a_stack_shares_is_asked_for_in_one_sentence():
  alone = MoE(D, 6, E, 'read_me', rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='read_me needs the logits of a stack: pass moe_shared'):
    alone(jnp.zeros((1, 2, D)))
  alone = MoE(D, 6, E, {'name': 'rmoe', 'share_cell': True}, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='share_cell=True needs the cell of a stack'):
    alone(jnp.zeros((1, 2, D)))


def test_a_pre_gated_layer_takes_the_logits_that_the_layer_below_made():
  first, second = (
    make_router('pre_gated', d_model=D, num_experts=E, rngs=nnx.Rngs(seed)) for seed in (0, 1)
  )
  x, above = jax.random.normal(jax.random.key(1), (2, 1, 3, D))
  own = first.scores(x, Context())
  np.testing.assert_allclose(own.logits, x @ first.scorer.kernel[...], atol=1e-6)
  next_one = second.scores(above, Context(state=own.state))
  np.testing.assert_allclose(next_one.logits, x @ first.scorer.next_kernel[...], atol=1e-6)


def test_states_that_do_not_fit_together_are_refused():
  def make_block(kind, rngs):
    attention = Attention(D, 2, 1, 4, causal=True, rngs=rngs)
    moe = MoE(D, 6, int(kind), 'gating_residual', rngs=rngs)
    return Block(D, attention=attention, moe=moe, rngs=rngs)

  stack = Stack.create(make_block, ['2', '3'], rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="state 'gating_residual' of shapes"):
    stack(jnp.zeros((1, 2, D)), Context())


def test_what_routers_share_of_all_tokens_is_refused_where_tokens_skip():
  """Logits of a whole sequence do not fit the tokens that go through the block."""
  make_shared_router = lambda rngs: make_shared(
    'read_me', d_model=D, num_experts=E, width=4, rngs=rngs
  )
  moe = lambda rngs: MoE(D, 6, E, {'name': 'read_me', 'width': 4}, rngs=rngs)
  model = Decoder(
    16, D, 2, 2, 8, moe=moe, moe_layers=(0, 1), moe_shared=make_shared_router, depth=Depth((1,), 0.5), rngs=nnx.Rngs(0)
  )  # fmt: skip
  with pytest.raises(ValueError, match='shared read_me in a block that tokens skip'):
    model(jnp.zeros((1, 4), jnp.int32), train=True)
