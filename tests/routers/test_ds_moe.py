"""All experts in training, the most probable in evaluation (DS-MoE)."""

import jax
import numpy as np
import pytest
from flax import nnx

from moejax import Context, MoE
from tests.routers.table import D, kept, make, tokens


def test_all_experts_in_evaluation_are_the_training_forward():
  layer = MoE(D, 6, 4, {'name': 'ds_moe'}, rngs=nnx.Rngs(0))
  x = tokens()
  np.testing.assert_allclose(layer(x)[0], layer(x, Context(train=True))[0], atol=1e-6)
  probs = jax.nn.softmax(x @ layer.router.scorer.kernel[...], -1)
  want = sum(probs[..., e : e + 1] * layer.experts.expert(e)(x) for e in range(4))
  np.testing.assert_allclose(layer(x)[0], want, atol=1e-5)


def test_evaluation_keeps_the_most_probable_at_their_probability():
  x = tokens()
  probs = np.asarray(make('ds_moe').scores(x, Context()).probs).reshape(12, 4)
  two = make('ds_moe', eval_k=2)(x, Context())
  np.testing.assert_allclose(two.weight.reshape(12, 2), -np.sort(-probs, 1)[:, :2], rtol=1e-6)
  above = make('ds_moe', eval_threshold=0.3)(x, Context())
  np.testing.assert_array_equal(kept(above), (probs > 0.3).sum(1))
  assert kept(make('ds_moe', eval_k=2)(x, Context(train=True))).tolist() == [4] * 12


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'eval_k': 0}, 'eval_k=0 with num_experts=4: accepted are 1 to 4'),
    ({'eval_threshold': 1.0}, 'eval_threshold=1.0: accepted are numbers'),
  ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    make('ds_moe', **options)
