"""Expert choice in groups at the same position of a fixed number of sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax import Context, make_router
from moejax.routers.expert_choice import from_groups, to_groups

B, S, D, E = 6, 5, 8, 4


def make(**options):
  sizes = {'d_model': D, 'num_experts': E, 'rngs': nnx.Rngs(0)}
  return make_router('expert_choice', **sizes, group='position', capacity_factor=1.0, **options)


def tokens(num_sequences=B):
  return jax.random.normal(jax.random.key(1), (num_sequences, S, D))


def rows(plan, num_sequences=B):
  """{(sequence, position, expert): weight} of the rows that are kept."""
  kept = [
    (divmod(int(token), S), int(expert), float(weight))
    for token, expert, weight in zip(plan.token, plan.expert, plan.weight, strict=True)
    if expert < E
  ]
  table = {(*place, expert): weight for place, expert, weight in kept}
  assert len(table) == len(kept)
  assert all(sequence < num_sequences for sequence, _, _ in table)
  return table


def test_a_group_is_the_position_in_so_many_sequences_in_a_row():
  numbers = jnp.arange(4 * 3).reshape(4, 3)  # token b * 3 + s
  groups = to_groups(numbers, 'position', 2)
  np.testing.assert_array_equal(groups, [[0, 3], [1, 4], [2, 5], [6, 9], [7, 10], [8, 11]])
  np.testing.assert_array_equal(from_groups(groups, 'position', (4, 3)), numbers)


@pytest.mark.parametrize('softmax_over', ['experts', 'tokens'])
def test_groups_of_two_sequences_route_like_batches_of_two(softmax_over):
  x = tokens()
  mask = jnp.arange(S)[None, :] < jnp.array([5, 3, 5, 5, 1, 2])[:, None]
  joined = rows(make(group_size=2, softmax_over=softmax_over)(x, Context(mask=mask)))
  separate = {}
  for first in range(0, B, 2):
    part = Context(mask=mask[first : first + 2])
    plan = make(softmax_over=softmax_over)(x[first : first + 2], part)
    moved = {(b + first, *rest): weight for (b, *rest), weight in rows(plan, 2).items()}
    separate |= moved
  assert joined.keys() == separate.keys()
  np.testing.assert_allclose([joined[key] for key in separate], list(separate.values()), rtol=1e-6)
  # the check can fail: one group of all sequences routes otherwise
  assert joined.keys() != rows(make(softmax_over=softmax_over)(x, Context(mask=mask))).keys()


def test_every_expert_takes_its_share_of_every_group():
  """E = 4 experts, one a token on average: of the 8 tokens of a group each takes 2, at every position."""
  plan = make(group_size=8)(tokens(16))
  assert plan.groups == 2
  taken = np.zeros((2, S, E), int)
  for sequence, position, expert in rows(plan, 16):
    taken[sequence // 8, position, expert] += 1
  assert (taken == 2).all()


def test_a_batch_smaller_than_the_group_is_one_group():
  x = tokens()
  wide, all_of_it = rows(make(group_size=256)(x)), rows(make()(x))
  assert wide == all_of_it


def test_a_group_that_does_not_divide_the_batch_is_refused():
  with pytest.raises(ValueError, match='group_size=4 does not divide the 6 sequences'):
    make(group_size=4)(tokens())


@pytest.mark.parametrize(
  'options', [{'group': 'sequence', 'group_size': 2}, {'group': 'position', 'group_size': 0}]
)
def test_a_group_size_that_means_nothing_is_refused(options):
  with pytest.raises(ValueError, match=r'group_size=\d with group='):
    make_router('expert_choice', d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
