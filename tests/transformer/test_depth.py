"""Blocks that tokens skip, against the whole block with the others hidden, and what each mode may look at."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE
from moejax.moe.losses import LOSSES
from moejax.transformer import Attention, Block, Decoder, Depth, SkippedBlock, rotation, visibility
from moejax.transformer.depth import _stats

B, S, D, C = 2, 8, 8, 3
CAPACITY = 0.3  # of 8 tokens: 2.4, so 3
TURN = rotation(jnp.arange(S, dtype=jnp.int32)[None], 4)


def make(decide='predictor', capacity=CAPACITY):
  rngs = nnx.Rngs(0)
  attention = Attention(D, 2, 2, 4, causal=True, rngs=rngs)
  block = Block(D, attention=attention, moe=MoE(D, 6, 4, rngs=rngs), rngs=rngs)
  return SkippedBlock(D, block, Depth((), capacity, decide), causal=True, rngs=rngs)


def tokens(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, S, D))


def call(layer, train=True):
  graph, state = nnx.split(layer)

  def apply(state, x, mask=None):
    visible = visibility(None, mask, causal=True)
    return nnx.merge(graph, state)(x, Context(mask=mask, train=train), TURN, visible)[:2]

  return jax.jit(apply), state


def by_hiding(layer, x, **fields):
  """The block on all tokens, those that skip hidden; chosen by sorting in numpy."""
  score = np.asarray(x @ layer.router.score.weight[...])[..., 0]
  chosen = np.zeros((B, S), bool)
  for row in range(B):
    chosen[row, np.argsort(-score[row])[: math.ceil(layer.capacity * S)]] = True
  chosen = jnp.asarray(chosen)
  visible = visibility(None, chosen, causal=True)
  y, _, _ = layer.block(x, Context(mask=chosen, train=True, **fields), TURN, visible)
  return chosen, jnp.where(chosen[..., None], x + score[..., None] * (y - x), x)


def test_the_chosen_go_through_the_block_among_themselves_and_the_others_are_unchanged():
  layer, x = make(), tokens()
  apply, state = call(layer)
  y, (inside, own) = apply(state, x)
  chosen, want = by_hiding(layer, x)
  np.testing.assert_allclose(y, want, atol=1e-5)
  np.testing.assert_array_equal(y[~chosen], x[~chosen])
  assert float(jnp.abs(y - x)[chosen].max()) > 1e-2
  assert float(inside.tokens) == float(own.kept_e[0]) == B * C
  assert float(own.unrouted) == B * (S - C)
  assert own.part == 'depth' and inside.part == 'moe'


def test_all_tokens_with_score_one_are_the_plain_block():
  layer, x = make(capacity=1.0), tokens()
  layer.router.score.weight[...] = jnp.zeros((D, 1)).at[0].set(1.0)
  x = x.at[..., 0].set(1.0)
  apply, state = call(layer)
  want = layer.block(x, Context(train=True), TURN)[0]
  np.testing.assert_allclose(apply(state, x)[0], want, atol=1e-5)


def test_padding_takes_no_place_and_does_not_show():
  apply, state = call(make())
  x, mask = tokens(), jnp.array([[True] * S, [True] * 2 + [False] * 6])
  y, (inside, own) = apply(state, x, mask)
  assert float(own.tokens) == S + 2
  assert float(own.kept_e[0]) == float(inside.tokens) == C + 2
  changed, _ = apply(state, x.at[1, 2:].set(50.0), mask)
  np.testing.assert_allclose(changed[1, :2], y[1, :2], atol=1e-5)


@pytest.mark.parametrize('decide', ['predictor', 'router'])
def test_training_looks_ahead_and_evaluation_does_not(decide):
  layer = make(decide)
  assert (layer.flags.prefix_safe_train, layer.flags.prefix_safe_eval) == (False, True)
  for train in (True, False):
    apply, state = call(layer, train)
    worst = other = 0.0
    for seed in range(20):
      x, new = tokens(seed), tokens(100 + seed)
      before, after = apply(state, x)[0], apply(state, x.at[0, 4:].set(new[0, 4:]))[0]
      worst = max(worst, float(jnp.abs(before - after)[0, :4].max()))
      other = max(other, float(jnp.abs(before - after)[1].max()))
    assert (worst > 1e-3) if train else (worst < 1e-5)
    through = float(apply(state, x)[1][-1].kept_e[0])
    assert through == B * C if train else 0 < through < B * S
    assert other == 0  # of other sequences


def test_tokens_that_decide_for_themselves_are_alone_the_same():
  """One token at a time, what it decides is what it decides in a whole sequence."""
  layer, x = make(), tokens()
  _, logit = layer.router(x)
  apart = layer.router(x.reshape(-1, 1, D))[1]
  np.testing.assert_allclose(apart.reshape(B, S), logit, atol=1e-6)
  apply, state = call(layer, train=False)
  through = np.asarray(jnp.abs(apply(state, x)[0] - x).max(-1) > 0)
  np.testing.assert_array_equal(through, np.asarray(logit) > 0)


def test_the_loss_is_the_published_cross_entropy_and_teaches_the_predictor_alone():
  """Logits 1, -1, 0.5, -0.2 with the first and third chosen: 0.424685 a token."""
  logits = jnp.array([[1.0, -1.0, 0.5, -0.2]])
  chosen, mask = jnp.array([[True, False, True, False]]), jnp.ones((1, 4), bool)
  stats = _stats(logits, logits, chosen, chosen, mask)
  assert float(LOSSES['guidance'](stats)) == pytest.approx(0.424685, abs=1e-6)
  graph, state = nnx.split(make())

  def gradient(of):
    def loss(state, x):
      y, stats, _ = nnx.merge(graph, state)(x, Context(train=True), TURN)
      return of(y, stats[-1])

    return jax.jit(jax.grad(loss, (0, 1)))(state, tokens())

  by_loss, by_x = gradient(lambda y, stats: LOSSES['guidance'](stats))
  assert float(jnp.abs(by_loss.router.hidden.weight[...]).max()) > 1e-4
  assert float(jnp.abs(by_x).max()) == float(jnp.abs(by_loss.router.score.weight[...]).max()) == 0
  by_task, _ = gradient(lambda y, stats: (y * y).sum())
  assert float(jnp.abs(by_task.router.score.weight[...]).max()) > 1e-3
  assert float(jnp.abs(by_task.router.hidden.weight[...]).max()) == 0


def test_a_model_with_skipped_layers_gives_their_stats_in_order():
  moe = lambda rngs: MoE(D, 6, 4, losses={}, rngs=rngs)
  options = {'moe': moe, 'moe_layers': (1, 3), 'depth': Depth((1, 3), 0.25)}
  model = Decoder(16, D, 4, 2, 12, **options, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  ids = jax.random.randint(jax.random.key(1), (B, S), 0, 16, jnp.int32)
  logits, stats = jax.jit(lambda s: nnx.merge(graph, s)(ids, train=True))(state)
  assert logits.shape == (B, S, 16)
  assert [(record.part, record.chosen_e.shape) for record in stats] == [
    ('moe', (2, 4)),
    ('depth', (2, 1)),
  ]
  np.testing.assert_array_equal(stats[0].tokens, B * 2)
  assert len(model.stack.segments) == 1  # plain and skipped blocks in turn: one loop


@pytest.mark.parametrize('of', ['previous', 'bigram'])
def test_a_hash_of_the_token_before_means_that_of_the_sequence(of):
  """Not the one that was chosen before it, in training as in evaluation, where all are there and some are hidden."""
  rngs = nnx.Rngs(0)
  attention = Attention(D, 2, 2, 4, causal=True, rngs=rngs)
  moe = MoE(D, 6, 16, {'name': 'hash', 'of': of}, losses={}, rngs=rngs)
  block = Block(D, attention=attention, moe=moe, rngs=rngs)
  layer = SkippedBlock(D, block, Depth((), 0.5, 'router'), causal=True, rngs=rngs)
  ids = jnp.arange(B * S, dtype=jnp.int32).reshape(B, S)
  x, fields = tokens(), {'token_ids': ids, 'positions': jnp.tile(jnp.arange(S) % 5, (B, 1))}
  chosen, want = by_hiding(layer, x, **fields)
  y, *_ = layer(x, Context(train=True, **fields), TURN, visibility(None, None, causal=True))
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert (np.diff(np.nonzero(np.asarray(chosen))[1]) > 1).any()  # the control: some skip between


def test_options_and_states_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='capacity=0.0: accepted are numbers above 0, up to 1'):
    Depth((), 0.0)
  with pytest.raises(ValueError, match="decide='luck': accepted are 'predictor', 'router'"):
    dataclasses.replace(Depth(), decide='luck')
  with pytest.raises(ValueError, match='accepted are routers without a state'):
    make()(tokens(), Context(state={'logits': jnp.zeros((B, S, 4))}), TURN)
