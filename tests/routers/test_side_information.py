"""Routers that look at more than the token: each by its definition, and what they say when it is not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.interpolate import BSpline

from moejax import Context, MoE, make_router
from moejax.moe.losses import guidance
from moejax.routers.kamoe import spline_basis

B, S, D, E = 2, 3, 8, 4


def router(name, **options):
  return make_router(name, d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)


def tokens(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, S, D))


def logits(made, **fields):
  return np.asarray(made.scores(tokens(), Context(**fields)).logits)


@pytest.mark.parametrize(
  ('name', 'sentence'),
  [
    ('m3vit', 'm3vit needs task: pass context.task'),
    ('family', 'family needs task: pass context.task'),
    ('speech_moe', 'speech_moe needs domain: pass context.domain'),
    ('time_moe', 'time_moe needs time: pass context.time'),
    ('space_moe', 'space_moe needs text: pass context.text'),
    ('hash', 'hash needs token ids: pass context.token_ids'),
    ('mask_moe', 'mask_moe needs token ids: pass context.token_ids'),
  ],
)
def test_what_is_missing_is_asked_for_in_one_sentence(name, sentence):
  made = router(name, **{'vocab_size': 16} if name == 'mask_moe' else {})
  assert made.flags.needs[0] == sentence.rpartition('.')[2]
  with pytest.raises(ValueError, match=f'^{sentence}$'):
    made(tokens())


def test_arrays_of_the_context_have_the_leading_shape_of_x():
  made = router('m3vit', tasks=2)
  x = tokens().reshape(B, 1, S, D)
  flat = made(tokens(), Context(task=jnp.array([0, 1])))
  np.testing.assert_array_equal(made(x, Context(task=jnp.array([[0], [1]]))).expert, flat.expert)
  with pytest.raises(ValueError, match=r'context.task of shape \(2,\): expected \(2, 1\)'):
    made(x, Context(task=jnp.array([0, 1])))


def test_every_task_has_its_own_gate():
  made = router('m3vit', tasks=2, noise_std=0.0)
  kernel = np.asarray(made.scorer.kernel[...])
  got = logits(made, task=jnp.array([1, 0]))
  for b, task in enumerate((1, 0)):
    np.testing.assert_allclose(got[b], np.asarray(tokens())[b] @ kernel[task], rtol=1e-5)


def test_a_task_embedding_stands_beside_the_token():
  made = router('m3vit', tasks=2, gate='embedding', width=3, noise_std=0.0)
  embedding = np.asarray(made.scorer.embedding[...])[[1, 0]]
  beside = np.concatenate([tokens(), np.repeat(embedding[:, None], S, 1)], -1)
  want = beside @ np.asarray(made.scorer.kernel[...])
  np.testing.assert_allclose(logits(made, task=jnp.array([1, 0])), want, atol=1e-5)


def test_a_gate_hears_the_utterance_or_each_frame_and_does_not_teach_the_embedding():
  made = router('speech_moe', width=2)
  kernel = np.asarray(made.scorer.kernel[...])
  frames = jax.random.normal(jax.random.key(2), (B, S, 2))
  want = np.concatenate([tokens(), frames], -1) @ kernel
  np.testing.assert_allclose(logits(made, domain=frames), want, atol=1e-5)
  whole = jnp.repeat(frames[:, :1], S, 1)
  np.testing.assert_allclose(
    logits(made, domain=frames[:, 0]), logits(made, domain=whole), atol=1e-6
  )
  taught = jax.grad(lambda e: (made.scores(tokens(), Context(domain=e)).logits ** 2).sum())(frames)
  assert float(jnp.abs(taught).max()) == 0
  with pytest.raises(ValueError, match='expected a last axis of width=2'):
    logits(made, domain=jnp.zeros((B, 3)))


def test_a_step_of_the_diffusion_has_one_expert_for_all_tokens():
  made = router('time_moe')
  times = jnp.linspace(0, 1, 16)
  chosen = made(jnp.zeros((16, S, D)), Context(time=times)).expert.reshape(16, S)
  np.testing.assert_array_equal(chosen, np.repeat(chosen[:, :1], S, 1))
  assert len(set(np.asarray(chosen[:, 0]).tolist())) > 1


@pytest.mark.parametrize('weighting', ['unweighted', 'softmax_topk'])
def test_text_tokens_send_what_they_attend_to(weighting):
  """`(1 / N) sum_n w_n e_n(h * mask_n)`, by loops (RAPHAEL, equation 3)."""
  made = router('space_moe', width=5, weighting=weighting)
  layer = MoE(D, 6, E, made, losses={}, rngs=nnx.Rngs(1))
  text = jax.random.normal(jax.random.key(2), (B, 4, 5))
  maps = jax.random.uniform(jax.random.key(3), (B, 4, S)) ** 3
  x = tokens()
  want = np.zeros((B, S, D))
  for b in range(B):
    for n in range(4):
      score = np.asarray(text[b, n] @ made.scorer.kernel[...])
      e = int(score.argmax())
      weight = 1.0 if weighting == 'unweighted' else np.exp(score[e]) / np.exp(score).sum()
      mask = maps[b, n] > 0.2 * maps[b, n].max()
      seen = jnp.where(mask[:, None], x[b], 0)
      want[b] += weight / 4 * np.asarray(layer.experts.expert(e)(seen))
  y, aux = layer(x, Context(text=text, maps=maps))
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert float(aux.stats.prob_e.sum()) == pytest.approx(B * S, rel=1e-5)


def test_an_image_goes_one_way_and_is_told_which():
  """The mean of the real tokens decides; guidance is the cross-entropy with the super-class, over images."""
  made = router('image')
  mask = jnp.array([[True] * 3, [True, False, False]])
  layer = MoE(D, 6, E, made, losses={'guidance': 0.3}, rngs=nnx.Rngs(1))
  x = np.asarray(tokens())
  mean = np.stack([x[0].mean(0), x[1, 0]])
  score = mean @ np.asarray(made.scorer.kernel[...])
  rows = made(tokens(), Context(mask=mask)).expert.reshape(B, S)
  np.testing.assert_array_equal(rows, np.where(mask, score.argmax(-1)[:, None], E))
  aux = layer(tokens(), Context(mask=mask, task=jnp.array([2, 0])))[1]
  log = score - np.log(np.exp(score).sum(-1, keepdims=True))
  want = -(3 * log[0, 2] + log[1, 0]) / 4
  assert float(aux.losses['guidance']) == pytest.approx(0.3 * want, rel=1e-5)
  assert float(guidance(layer(tokens())[1].stats)) == 0


def test_a_place_has_its_experts_whatever_stands_there():
  made = router('spatial', positions=5)
  places = jnp.array([[4, 0, 2], [2, 4, 0]])
  first, second = (
    made(tokens(seed), Context(positions=places)).expert.reshape(B, S, 2) for seed in (1, 2)
  )
  np.testing.assert_array_equal(first, second)
  np.testing.assert_array_equal(first[0], first[1][jnp.array([1, 2, 0])])
  np.testing.assert_array_equal(logits(made)[0], made.scorer.kernel[...][:S])
  assert float(jnp.abs(made.scorer.kernel[...]).max()) <= np.sqrt(3 * E / 2)
  with pytest.raises(ValueError, match='positions=2 of spatial with sequences of 3'):
    router('spatial', positions=2)(tokens())


def test_the_expert_of_the_family_always_works():
  made = router('family', k=2)
  rows = made(tokens(), Context(task=jnp.array([3, 1])))
  chosen = np.asarray(rows.expert.reshape(B, S, 2))
  np.testing.assert_array_equal(chosen[..., 0], [[3] * S, [1] * S])
  probs = np.asarray(made.scores(tokens(), Context(task=jnp.array([3, 1]))).probs)
  for b, own in enumerate((3, 1)):
    others = probs[b].copy()
    others[:, own] = -1
    np.testing.assert_array_equal(chosen[b, :, 1], others.argmax(-1))
  np.testing.assert_allclose(rows.weight.reshape(-1, 2).sum(1), 1, rtol=1e-5)
  with pytest.raises(ValueError, match='k=1: accepted are 2 to 4'):
    router('family', k=1)


def test_splines_are_scipys_and_weights_of_all_experts_lie_between_0_and_1():
  x = np.linspace(-0.99, 0.99, 7)
  knots = -1 + 0.5 * np.arange(-3, 8)
  want = BSpline.design_matrix(x, knots, 3).toarray()
  np.testing.assert_allclose(spline_basis(jnp.asarray(x)[:, None], 4)[:, 0], want, atol=1e-6)
  rows = router('kamoe')(tokens())
  assert rows.weight.size == B * S * E
  assert bool(((rows.weight > 0) & (rows.weight < 1)).all())
