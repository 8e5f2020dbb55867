"""Over-trained mixtures in place of larger ones (Yun et al. 2024), by the joint law for want of theirs."""

import numpy as np
import pytest

from moejax.scaling import JOINT, Budget, Family, best_of
from moejax.scaling.accounting import joint
from moejax.scaling.serving import (
  Server,
  bounded_cost,
  bounded_loss,
  cost_per_request,
  largest_batch,
  total_parameters,
)


def server(**change):
  """40 GB GPUs in bfloat16; reading the weights takes half of the time of a full batch."""
  values = {
    'memory': 20e9,
    'price': 1.0,
    'prompt': 160.0,
    'output': 140.0,
    'kv_coefficient': 0.05,
    'latency': lambda batch, gpus: (10.0 + 0.1 * batch) / gpus,
  }
  return Server(**{**values, **change})


def best(E, flops):
  family = Family(E, 1, lambda d: joint(d, E), lambda N, D: JOINT(N=N, D=D, E=E))
  return best_of(family, Budget(flops))


@pytest.mark.parametrize('E', [8, 16])
def test_a_smaller_mixture_of_more_experts_reaches_the_loss_of_four(E):
  """An N' inside (0, N_opt) of equal loss; with 8 experts it also has fewer parameters in all."""
  flops, four, more = 1e22, best(4, 1e22), best(E, 1e22)
  small = bounded_loss(lambda N, D: float(JOINT(N=N, D=D, E=E)), four.loss, flops, more.N)
  assert small < 0.7 * more.N
  assert float(JOINT(N=small, D=flops / (6 * small), E=E)) == pytest.approx(four.loss, abs=1e-9)
  # the same trained on as few tokens as its own optimum would be worse: it is over-trained
  assert float(JOINT(N=small, D=more.tokens, E=E)) > four.loss
  totals = {E: total_parameters(small, E), 'own': total_parameters(more.N, E)}
  assert totals[E] < totals['own']


def test_a_loss_below_the_optimum_is_refused():
  with pytest.raises(ValueError, match='below the best loss'):
    bounded_loss(lambda N, D: float(JOINT(N=N, D=D, E=8)), 1.5, 1e22, best(8, 1e22).N)


@pytest.mark.parametrize('E, total', [(1, 1.0), (4, 2.0), (16, 6.0)])
def test_experts_are_a_third_of_the_dense_parameters_each(E, total):
  assert total_parameters(1e9, E) == pytest.approx(total * 1e9)


def test_the_batch_fills_what_weights_leave_of_the_memory():
  batch = largest_batch(server(), 1e9, 4, gpus=2)
  elements = batch * (2 * 160 + 140) * 0.05 * 1e9 ** (2 / 3)
  assert elements + 2e9 == pytest.approx(40e9)
  assert largest_batch(server(), 60e9, 4, gpus=2) < 0


def test_the_cheapest_number_of_gpus_is_taken():
  N, E = 4e9, 16
  costs = []
  for gpus in range(1, 9):
    batch = largest_batch(server(), N, E, gpus)
    costs.append((10.0 + 0.1 * batch) / batch if batch >= 1 else np.inf)
  assert cost_per_request(server(), N, E, max_gpus=8) == pytest.approx(min(costs))
  with pytest.raises(ValueError, match='max_gpus=1 hold no mixture'):
    cost_per_request(server(), N, E, max_gpus=1)


def test_a_bounded_cost_is_met_exactly_or_not_needed():
  cost = lambda N: cost_per_request(server(), N, 8)
  bound = cost(2e9)
  assert bounded_cost(cost, bound, 8e9) == pytest.approx(2e9, rel=1e-6)
  assert bounded_cost(cost, bound, 1e9) == 1e9
  with pytest.raises(ValueError, match='below the cost of any size'):
    bounded_cost(cost, 1e-9, 8e9)
