"""Costs as the papers count them: their tables, and the rules of the compute speed-up factor."""

import numpy as np
import pytest

from moejax.scaling.accounting import (
  fine_grained,
  inference_optimal_learning_rate,
  joint,
  joint_learning_rate,
  speed_up,
  zettaflops,
)


@pytest.mark.parametrize(
  'layers, width, moe, cost',
  [
    (12, 768, False, 0.36),
    (24, 1024, False, 1.06),
    (24, 2048, False, 3.57),
    (32, 2560, False, 7.08),
    (32, 4096, False, 17.12),
    (40, 5120, False, 32.67),
    (12, 768, True, 0.43),
    (24, 1024, True, 1.30),
    (24, 2048, True, 4.53),
    (32, 4096, True, 22.27),
  ],
)
def test_zettaflops_of_the_models_of_artetxe_et_al(layers, width, moe, cost):
  counted = zettaflops(num_layers=layers, d_model=width, tokens=300e9, moe=moe)
  assert counted == pytest.approx(cost, abs=0.0055)  # half of the last digit; 13B is 32.6754


def test_granularity_costs_routing_and_nothing_else():
  one, many = fine_grained(1024.0, 64, 1), fine_grained(1024.0, 64, 16)
  assert many.active == one.active
  assert many.total == one.total
  # share of routing: E G c_r / (72 d)
  share = (many.training_flops - 72 * 1024**2 * 16) / (72 * 1024**2 * 16)
  assert float(share) == pytest.approx(64 * 16 * 14 / (72 * 1024))


def test_a_single_expert_is_a_dense_model():
  counts = fine_grained(512.0, 1, 1)
  assert counts.total == counts.active
  assert counts.training_flops == 6 * counts.active


@pytest.mark.parametrize(
  'width, blocks, active',
  [(512, 8, 79e6), (768, 12, 169e6), (1024, 16, 321e6), (1408, 22, 709e6), (1152, 18, 426e6)],
)
def test_active_parameters_of_the_joint_runs(width, blocks, active):
  assert blocks == width / 64
  assert float(joint(width, 4).active) == pytest.approx(active, rel=0.01)


def test_total_parameters_of_the_joint_comparison_at_one_billion():
  totals = [float(joint(width, E).total) for width, E in ((1664, 1), (1408, 2), (1152, 4))]
  assert totals == pytest.approx([1.1e9] * 3, abs=0.05e9)


def test_the_learning_rate_of_the_joint_code():
  assert float(joint_learning_rate(256, 4, 1)) == pytest.approx(6.1e-3, rel=0.01)
  assert float(joint_learning_rate(256, 4, 16)) == pytest.approx(6.1e-3 / 2, rel=0.01)


def test_the_learning_rate_of_yun_et_al_falls_by_a_set_step_for_each_doubling():
  rates = inference_optimal_learning_rate(np.array([1e8, 2e8]))
  assert rates[0] == pytest.approx(0.003239 - 0.0001395 * 18.420681, rel=1e-6)
  assert rates[0] - rates[1] == pytest.approx(0.0001395 * 0.693147, rel=1e-5)


DENSE = {'dense_costs': np.array([0.36, 1.06, 3.57]), 'dense_values': np.array([20.0, 16.0, 12.0])}


def test_a_family_compared_with_itself_has_a_speed_up_of_one():
  for value in (20.0, 17.3, 16.0, 12.0):
    factor = speed_up(
      value, **DENSE, moe_costs=DENSE['dense_costs'], moe_values=DENSE['dense_values']
    )
    assert factor == pytest.approx(1.0)


def test_between_two_runs_the_cost_is_logarithmic():
  factor = speed_up(
    14.0, **DENSE, moe_costs=np.array([4.0, 0.5]), moe_values=np.array([13.0, 15.0])
  )
  assert factor == pytest.approx((1.06 * 3.57) ** 0.5 / (0.5 * 4.0) ** 0.5)


def test_accuracies_rise_where_perplexities_fall():
  rising = {'dense_costs': DENSE['dense_costs'], 'dense_values': np.array([0.3, 0.4, 0.5])}
  factor = speed_up(0.4, **rising, moe_costs=np.array([0.3, 0.6]), moe_values=np.array([0.4, 0.6]))
  assert factor == pytest.approx(1.06 / 0.3)


@pytest.mark.parametrize('value', [11.9, 20.1])
def test_nothing_is_extrapolated(value):
  with pytest.raises(ValueError, match='nothing is extrapolated: accepted is 12 to 20'):
    speed_up(value, **DENSE, moe_costs=np.array([0.1, 9.0]), moe_values=np.array([30.0, 5.0]))


def test_values_that_do_not_follow_the_cost_are_refused():
  with pytest.raises(ValueError, match='only fall or only rise'):
    speed_up(14.0, **DENSE, moe_costs=np.arange(1.0, 4.0), moe_values=np.array([15.0, 13.0, 14.0]))
