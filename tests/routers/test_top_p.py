"""As many experts as a token needs: golden values of the table, and the definition by loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.top_p import TopPAssign
from tests.routers.table import H, kept, make, tokens


def top_p(p, logits=H, max_k=4, renorm=False):
  scores = TokenAffinity('softmax', 4)(logits[None], None, None, Context())
  return TopPAssign(p, p, max_k, renorm)(scores, Context())


@pytest.mark.parametrize(
  ('p', 'want'),
  [
    (0.0, [1, 1, 1, 1, 1, 1]),
    (0.4, [1, 1, 1, 1, 1, 2]),
    (0.6, [1, 2, 1, 2, 1, 3]),
    (0.9, [3, 4, 3, 3, 3, 4]),
    (1.0, [4, 4, 4, 4, 4, 4]),
  ],
)
def test_top_p_keeps_as_many_as_it_takes_to_exceed_p(p, want):
  np.testing.assert_array_equal(kept(top_p(p)), want)


def test_top_p_weights_are_the_probabilities_of_the_kept():
  probs = np.asarray(jax.nn.softmax(H, -1), np.float64)
  for p in (0.0, 0.3, 0.6, 0.9):
    plan, renormed = top_p(p), top_p(p, renorm=True)
    for t in range(6):
      order = np.argsort(-probs[t], kind='stable')
      total, want = 0.0, {}
      for e in order:  # the definition: add experts until the sum exceeds p
        want[e] = probs[t, e]
        total += probs[t, e]
        if total > p:
          break
      row = slice(4 * t, 4 * t + len(want))
      assert plan.expert[row].tolist() == list(want)
      np.testing.assert_allclose(plan.weight[row], list(want.values()), rtol=1e-5)
      np.testing.assert_allclose(renormed.weight[row] * total, list(want.values()), rtol=1e-5)


def test_top_p_of_equal_logits_costs_what_the_entropy_loss_is_there_for():
  """16 experts, p = 0.4: seven experts a token."""
  scores = TokenAffinity('softmax', 16)(jnp.zeros((1, 3, 16)), None, None, Context())
  assert kept(TopPAssign(0.4, 0.4, 16)(scores, Context())).tolist() == [7, 7, 7]
  assert kept(TopPAssign(0.4, 0.4, 5)(scores, Context())).tolist() == [5, 5, 5]


def test_top_p_has_one_p_for_training_and_one_for_evaluation():
  router = make('top_p', p=0.9, eval_p=0.0)
  assert kept(router(tokens(), Context(train=True))).min() >= 2
  assert kept(router(tokens(), Context())).max() == 1


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'p': -0.1}, 'p=-0.1: accepted are numbers from 0'),
    ({'max_k': 5}, 'max_k=5 with num_experts=4: accepted are 1 to 4'),
    ({'max_k': 1, 'renorm': True}, "the router's gradient zero"),
  ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    make('top_p', **options)
