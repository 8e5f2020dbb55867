"""What a config gives a layer, a router or an exchange has the type that they are annotated with."""

import functools
from collections.abc import Sequence

import pytest
from flax import nnx

from moejax import router_names
from moejax.moe.kinds import make_layer
from moejax.moe.momentum import make_momentum
from moejax.option_types import check_types
from moejax.routers import check_router_options, make_router


def taker(*, k: int, p: float, on: bool, name: str | None, widths: Sequence[int] | None, free=None):
  return k, p, on, name, widths, free


@pytest.mark.parametrize(
  ('name', 'good', 'bad', 'accepted'),
  [
    ('k', (1, -1), (1.0, True, 'x', None, (1,)), 'integers'),
    ('p', (1, 0.5), (True, 'x', None, [0.5]), 'numbers'),
    ('on', (True,), (1, 'True'), 'True or False'),
    ('name', ('x', None), (1, ()), 'texts or None'),
    ('widths', ((1, 2), [1], None), (1, '1,2'), 'lists of numbers or None'),
    ('free', (1, 'x', None), (), ''),
  ],
)
def test_values_are_compared_with_annotations(name, good, bad, accepted):
  for value in good:
    check_types('it', functools.partial(taker, k=1), {name: value})
  for value in bad:
    with pytest.raises(ValueError, match=f'{name}=.* of it: accepted are {accepted}$'):
      check_types('it', taker, {name: value})


def test_annotations_that_cannot_be_read_are_passed_over():
  def later(k: 'NotImported'):
    return k

  class Callable:
    def __call__(self, k: int):
      return k

  check_types('it', later, {'k': 'x'})
  check_types('it', Callable(), {'k': 'x'})


@pytest.mark.parametrize('name', router_names())
def test_every_router_has_annotations_that_can_be_read(name):
  check_router_options(name, {})


@pytest.mark.parametrize(
  ('make', 'sentence'),
  [
    (lambda rngs: _router(rngs, 'top_p', p='x'), "p='x' of router 'top_p': accepted are numbers"),
    (lambda rngs: _router(rngs, 'soft', slots='4'), "slots='4' of router 'soft': .* integers"),
    (
      lambda rngs: _router(rngs, 'switch', capacity_factor='2'),
      "capacity_factor='2' of router 'switch': accepted are numbers or None",
    ),
    (
      lambda rngs: make_momentum({'name': 'heavy_ball', 'mu': 'x'}),
      "mu='x' of momentum 'heavy_ball'",
    ),
    (lambda rngs: _layer(rngs, 'multi_head', heads='x'), "heads='x' of kind 'multi_head'"),
    (lambda rngs: _layer(rngs, 'peer', k=2.0), "k=2.0 of kind 'peer': accepted are integers"),
    (lambda rngs: _layer(rngs, 'experts', widths=3), "widths=3 of kind 'experts': .* lists of"),
  ],
)
def test_another_type_is_told_before_it_is_computed_with(make, sentence):
  with pytest.raises(ValueError, match=sentence):
    make(nnx.Rngs(0))


def _router(rngs, name, **options):
  return make_router(name, d_model=4, num_experts=4, rngs=rngs, **options)


def _layer(rngs, kind, **options):
  return make_layer(kind, 8, 8, 4, {'name': 'top_k', 'k': 1}, options=options, rngs=rngs)
