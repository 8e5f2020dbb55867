"""Published laws against the tables that their papers print."""

import numpy as np
import pytest

from moejax.scaling import CHINCHILLA, CLARK, FINE_GRAINED, JOINT, effective_experts
from moejax.scaling.accounting import fine_grained, fine_grained_width

# Krajewski et al. 2024, table 2: active parameters, tokens, granularity, FLOPs, loss
FINE_GRAINED_TABLE = [
  (100e6, 4.37e9, 8, 2.95e18, 3.133),
  (1e9, 28.94e9, 16, 1.93e20, 2.491),
  (3e9, 72.90e9, 16, 1.41e21, 2.245),
  (7e9, 137.60e9, 32, 6.46e21, 2.076),
  (70e9, 941.07e9, 32, 4.16e23, 1.694),
  (300e9, 2.96e12, 64, 5.69e24, 1.503),
  (1e12, 7.94e12, 64, 4.97e25, 1.367),
]


@pytest.mark.parametrize('active, tokens, grain, flops, loss', FINE_GRAINED_TABLE)
def test_losses_and_flops_of_the_fine_grained_table(active, tokens, grain, flops, loss):
  counts = fine_grained(fine_grained_width(active), 64, grain)
  assert float(counts.active) == pytest.approx(active, rel=1e-9)
  assert float(counts.training_flops * tokens) == pytest.approx(flops, rel=0.01)
  predicted = float(FINE_GRAINED['E=64'](N=counts.N, D=tokens, G=grain))
  assert predicted == pytest.approx(loss, abs=0.03)
  # the coefficients are rounded, and the naive reading of N, the active parameters, is far off
  assert abs(float(FINE_GRAINED['E=64'](N=active, D=tokens, G=grain)) - loss) > 0.1


def test_a_label_of_64_x_100m_has_43_times_its_active_parameters():
  counts = fine_grained(fine_grained_width(100e6), 64)
  assert float(counts.total / counts.active) == pytest.approx(516 / 12)


# Ludziejewski et al. 2025, table 4: E, Ehat, m, mu, n, nu
JOINT_TABLE = [
  (1, 2.073, 30.3640, -0.1817, 53.9838, -0.1965),
  (2, 3.056, 27.7982, -0.1780, 66.8401, -0.2065),
  (4, 5.001, 24.8462, -0.1731, 87.7022, -0.2192),
  (8, 8.812, 21.8330, -0.1676, 119.9126, -0.2338),
  (16, 16.139, 19.0159, -0.1617, 167.5073, -0.2494),
  (32, 29.704, 16.5424, -0.1557, 234.6726, -0.2652),
]


@pytest.mark.parametrize('E, effective, m, mu, n, nu', JOINT_TABLE)
def test_the_joint_law_at_a_number_of_experts_is_chinchillas(E, effective, m, mu, n, nu):
  assert float(effective_experts(E, JOINT.E_start, JOINT.E_max)) == pytest.approx(
    effective, abs=6e-4
  )
  np.testing.assert_allclose(JOINT.at(E), (m, mu, n, nu), rtol=0.02)
  plain = m * 1e9**mu + n * 1e11**nu + 1.3637
  assert float(JOINT(N=1e9, D=1e11, E=E)) == pytest.approx(plain, abs=0.003)


def test_effective_experts_start_at_one_end_rise_and_stay_below_the_other():
  E = np.geomspace(1, 1e6, 60)
  effective = effective_experts(E, 2.0732, 290.4521)
  assert effective[0] == pytest.approx(2.0732, rel=1e-12)
  assert (np.diff(effective) > 0).all()
  assert effective[-1] < 290.4521
  assert effective[-1] == pytest.approx(290.4521, rel=1e-3)


def test_more_experts_always_help_within_the_range_of_the_joint_fit():
  N, D, E = (
    axis.ravel() for axis in np.meshgrid([1e8, 1e9, 3e9], [5e9, 5e10, 1e11], [1, 2, 4, 8, 16, 32])
  )
  loss = JOINT(N=N, D=D, E=E).reshape(3, 3, 6)
  assert (np.diff(loss, axis=-1) < 0).all()


def test_at_equal_total_size_experts_beat_a_dense_model_with_fewer_active_parameters():
  """Ludziejewski et al. 2025, the 1.1B comparison; losses computed from the printed law."""
  losses = [
    float(JOINT(N=N, D=D, E=E)) for N, D, E in ((1.1e9, 8e9, 1), (709e6, 16e9, 2), (426e6, 32e9, 4))
  ]
  assert losses == pytest.approx([2.666, 2.626, 2.597], abs=0.005)


@pytest.mark.parametrize(
  'N, E, dense', [(1e8, 64, 4.6e8), (1e9, 64, 3.1e9), (1e9, 512, 4.9e9), (1e10, 64, 2.1e10)]
)
def test_effective_dense_sizes_of_s_base(N, E, dense):
  law = CLARK['s-base']
  size = float(law.dense_size(N=N, E=E))
  assert f'{size:.1e}' == f'{dense:.1e}'
  assert float(law(N=size, E=1)) == pytest.approx(float(law(N=N, E=E)), rel=1e-10)  # its definition


def test_a_single_expert_is_its_own_dense_model():
  assert float(CLARK['hash'].dense_size(N=3e8, E=1)) == pytest.approx(3e8, rel=1e-12)


@pytest.mark.parametrize(
  'name, size, tokens', [('besiroglu', 72e9, 1.33e12), ('hoffmann', 32e9, 3.0e12)]
)
def test_what_two_sets_of_chinchillas_constants_say_of_its_budget(name, size, tokens):
  N = np.geomspace(1e9, 1e12, 20001)
  loss = CHINCHILLA[name](N=N, D=5.76e23 / (6 * N))
  best = N[np.argmin(loss)]
  assert best == pytest.approx(size, rel=0.03)
  assert 5.76e23 / (6 * best) == pytest.approx(tokens, rel=0.03)


def test_laws_take_arrays_that_broadcast():
  loss = FINE_GRAINED['E=64'](N=np.array([[1e9], [2e9]]), D=1e10, G=np.array([1, 2, 4]))
  assert loss.shape == (2, 3)
  assert loss.dtype == np.float64
