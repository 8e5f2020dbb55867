"""The best model for a budget against the tables of the papers, and claims that follow from the laws."""

import numpy as np
import pytest

from moejax.scaling import FINE_GRAINED, JOINT, Budget, Family, best_of, ranked
from moejax.scaling.accounting import fine_grained, joint

GRAINS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def fine(G, E=64):
  law = FINE_GRAINED[f'E={E}']
  return Family(E, G, lambda d: fine_grained(d, E, G), lambda N, D: law(N=N, D=D, G=G))


def by_experts(E):
  return Family(E, 1, lambda d: joint(d, E), lambda N, D: JOINT(N=N, D=D, E=E))


# Ludziejewski et al. 2025, table 1: N_opt and D_opt at E = 1, 2, 4, 8, 16, 32, in 1e9
JOINT_OPTIMA = {
  1e20: [(1.7, 9.7), (1.5, 11.4), (1.2, 13.9), (0.99, 17), (0.81, 20.7), (0.669, 24.9)],
  1e21: [(5.7, 29.3), (5, 33), (4.4, 38), (3.8, 44.3), (3.3, 51.2), (2.85, 58.4)],
  1e22: [(18.8, 88.6), (17.4, 96), (15.8, 105.4), (14.4, 115.8), (13.2, 126.5), (12.2, 136.9)],
}
# of the printed law at these points
JOINT_LOSSES = {
  1e20: [2.590, 2.575, 2.554, 2.529, 2.501, 2.472],
  1e21: [2.350, 2.335, 2.316, 2.295, 2.271, 2.248],
  1e22: [2.158, 2.143, 2.126, 2.107, 2.088, 2.069],
}


@pytest.mark.parametrize('flops', JOINT_OPTIMA)
def test_compute_optimal_sizes_and_tokens_of_the_joint_law(flops):
  for index, (size, tokens) in enumerate(JOINT_OPTIMA[flops]):
    best = best_of(by_experts(2**index), Budget(flops))
    # 2 %, and half of the last printed digit of sizes with two
    assert best.N == pytest.approx(size * 1e9, rel=0.02, abs=0.05e9 if size < 6 else 0)
    assert best.tokens == pytest.approx(tokens * 1e9, rel=0.02)
    assert best.loss == pytest.approx(JOINT_LOSSES[flops][index], abs=6e-4)


def test_the_search_finds_the_closed_form():
  """Sizes of the closed form N = G (F / 6)^(nu / (mu + nu)) with G = (mu m / (nu n))^(1 / (mu + nu))."""
  for E in (1, 4, 32):
    m, mu, n, nu = (abs(float(value)) for value in JOINT.at(E))
    closed = (mu * m / (nu * n)) ** (1 / (mu + nu)) * (1e21 / 6) ** (nu / (mu + nu))
    best = best_of(by_experts(E), Budget(1e21))
    assert best.N == pytest.approx(closed, rel=1e-4)
    assert 6 * best.N * best.tokens == pytest.approx(1e21, rel=1e-9)


# Ludziejewski et al. 2025, table 2: experts at 24, 80 and 640 GB; 32 stands for 32 or more
MEMORY_TABLE = {
  1e21: (16, 32, 32),
  1e22: (4, 16, 32),
  1e23: (1, 8, 32),
  1e24: (1, 1, 16),
}
MEMORIES = (24e9, 80e9, 640e9)


def test_memory_optimal_experts_agree_within_one_step_and_within_a_loss_of_7e_3():
  found = np.zeros((4, 3))
  for row, (flops, printed) in enumerate(MEMORY_TABLE.items()):
    for column, (memory, E) in enumerate(zip(MEMORIES, printed, strict=True)):
      choices = ranked([by_experts(2**k) for k in range(6)], Budget(flops, memory=memory))
      theirs = next(choice for choice in choices if choice.E == E)
      assert theirs.margin < 0.007
      assert 0.5 <= choices[0].E / E <= 2
      assert all(choice.memory <= memory for choice in choices)
      found[row, column] = choices[0].E
  assert (np.diff(found, axis=1) >= 0).all()  # more memory, more experts
  assert (np.diff(found, axis=0) <= 0).all()  # more FLOPs in the same memory, fewer


def test_inference_tokens_are_paid_from_the_budget_and_make_models_smaller():
  plain = best_of(by_experts(8), Budget(5e22))
  served = best_of(by_experts(8), Budget(5e22, inference_tokens=1e12))
  assert 6 * served.N * served.tokens + 2 * served.N * 1e12 == pytest.approx(5e22, rel=1e-9)
  assert served.N < plain.N
  assert served.loss > plain.loss


def test_a_budget_that_holds_nothing_is_refused():
  with pytest.raises(ValueError, match='accepted are larger budgets'):
    ranked([by_experts(1)], Budget(1e21, memory=1e6))
  with pytest.raises(ValueError, match='accepted are larger budgets'):
    ranked([by_experts(1)], Budget(1e12, inference_tokens=1e12))


@pytest.mark.parametrize('budget', [{'flops': 0.0}, {'flops': 1e20, 'memory': -1.0}])
def test_a_budget_is_positive(budget):
  with pytest.raises(ValueError, match='more than 0'):
    Budget(**budget)


# ---- claims of Krajewski et al. 2024, with the printed coefficients -------------------------------


def flops_to_match(family, loss):
  low, high = 1e16, 1e30
  for _ in range(60):
    middle = (low * high) ** 0.5
    low, high = (middle, high) if best_of(family, Budget(middle)).loss > loss else (low, middle)
  return high


# Extra FLOPs of G = 1 as Brent's method on the written-out law gives them; a coarser search had
# 1.68, 1.88, 2.02, 2.17, 2.25. Those of dense models are whole numbers.
CLAIMS = [  # FLOPs, best G, extra FLOPs of G = 1, extra FLOPs of a dense model
  (1e18, 8, 1.701, 17),
  (1e20, 16, 1.893, 21),
  (1e22, 32, 2.049, 25),
  (1e24, 32, 2.171, 30),
  (1e26, 64, 2.283, 34),
]


@pytest.mark.parametrize('flops, grain, coarse, dense', CLAIMS)
def test_fine_grained_experts_save_compute(flops, grain, coarse, dense):
  choices = ranked([fine(G) for G in GRAINS], Budget(flops))
  assert choices[0].G == grain
  assert choices[0].margin == 0 < choices[1].margin
  assert flops_to_match(fine(1), choices[0].loss) / flops == pytest.approx(coarse, abs=6e-4)
  assert flops_to_match(fine(1, E=1), choices[0].loss) / flops == pytest.approx(dense, abs=0.5)


def test_the_claimed_trends():
  _, grains, coarse, dense = zip(*CLAIMS, strict=True)
  assert list(grains) == sorted(grains)
  assert list(coarse) == sorted(coarse)
  assert list(dense) == sorted(dense)
