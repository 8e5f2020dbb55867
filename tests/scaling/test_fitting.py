"""Fits: noiseless points come back, noisy ones within their noise, and what cannot be fitted is refused."""

import dataclasses

import numpy as np
import pytest
from scipy.optimize import minimize

from moejax.scaling import CHINCHILLA, CLARK, FINE_GRAINED, FORMS, JOINT, InferenceOptimal, fit_law
from moejax.scaling.accounting import fine_grained, joint
from moejax.scaling.fitting import Huber, _Problem, encode

LAWS = {
  'chinchilla': CHINCHILLA['besiroglu'],
  'clark': CLARK['s-base'],
  'fine_grained': FINE_GRAINED['E=64'],
  'inference_optimal': InferenceOptimal(  # made up: the paper prints none
    a=200.0,
    alpha=0.3,
    b=0.5,
    beta=0.4,
    c=400.0,
    gamma=0.3,
    f=1.0,
    d=-1e-3,
    E_start=1.9,
    E_max=300.0,
  ),
  'joint': JOINT,
}
WIDTHS, TOKENS = (256, 384, 512, 640, 768, 1024), (16e9, 33e9, 66e9)


def grid(name):
  """Six sizes x three lengths x five granularities or numbers of experts, as Krajewski et al. had."""
  d, D, x = (axis.ravel() for axis in np.meshgrid(WIDTHS, TOKENS, (1.0, 2.0, 4.0, 8.0, 16.0)))
  by_grain = 'E' not in FORMS[name].columns
  counts = fine_grained(d, 64, x) if by_grain else joint(d, x)
  columns = {'N': counts.N, 'D': D, 'G': x, 'E': x}
  return {key: columns[key] for key in FORMS[name].columns}


@pytest.mark.parametrize('name', LAWS)
def test_noiseless_points_come_back(name):
  """Predictions on the grid and far beyond, not raw coefficients: these are nearly degenerate."""
  law, runs = LAWS[name], grid(name)
  fit = fit_law(FORMS[name], runs, law(**runs), draws=0)
  assert fit.rmse < 1e-6
  assert fit.held_out_rmse < 1e-5
  assert fit.held_out.sum() == 18
  beyond = {**runs, 'N': 10 * runs['N']}
  np.testing.assert_allclose(fit.law(**beyond), law(**beyond), rtol=1e-4)


def test_the_optimal_granularity_of_a_noiseless_refit():
  runs = grid('fine_grained')
  law = FINE_GRAINED['E=64']
  refit = fit_law(FORMS['fine_grained'], runs, law(**runs), draws=0).law
  assert refit.alpha == pytest.approx(law.alpha, abs=1e-3)
  assert refit.gamma == pytest.approx(law.gamma, abs=1e-2)
  G = np.array([1, 2, 4, 8, 16, 32, 64])
  d = np.geomspace(256, 16384, 400)[:, None]
  counts = fine_grained(d, 64, G[None, :])
  loss = refit(N=counts.N, D=1.93e20 / counts.training_flops, G=G[None, :])
  assert G[np.unravel_index(loss.argmin(), loss.shape)[1]] == 16


@pytest.mark.parametrize('name', LAWS)
def test_gradients_are_those_of_finite_differences(name, rng):
  law, runs = LAWS[name], grid(name)
  loss = law(**runs) * np.exp(rng.normal(0, 0.05, len(runs['N'])))
  for on_log in (False, True):
    problem = _Problem(FORMS[name], runs, loss, Huber(0.03, on_log))  # some runs on the linear part
    theta = encode(FORMS[name], law) + rng.normal(0, 0.01, len(FORMS[name].names))
    np.testing.assert_allclose(
      problem.exponentials(encode(FORMS[name], law)).sum(0), law(**runs), rtol=1e-12
    )
    steps = 1e-6 * np.eye(len(theta))
    slopes = [(problem(theta + step)[0] - problem(theta - step)[0]) / 2e-6 for step in steps]
    np.testing.assert_allclose(
      problem(theta)[1], slopes, rtol=1e-5, atol=1e-6 * np.abs(slopes).max()
    )


@pytest.mark.parametrize('name', ['chinchilla', 'fine_grained'])
def test_scipys_l_bfgs_finds_nothing_lower(name, rng):
  runs = grid(name)
  loss = LAWS[name](**runs) + rng.normal(0, 0.01, len(runs['N']))
  form = FORMS[name]
  fit = fit_law(form, runs, loss, draws=0)
  problem = _Problem(form, runs, loss, Huber(form.delta, form.on_log))
  ours = encode(form, fit.law)
  for start in (ours, ours * 1.05, encode(form, LAWS[name])):
    theirs = minimize(problem, start, jac=True, method='L-BFGS-B', options={'maxiter': 300})
    assert theirs.fun > problem(ours)[0] * (1 - 1e-6)


def test_with_noise_errors_are_of_its_size_and_intervals_hold_the_truth(rng):
  """Of coefficients that the points determine: size of the model, granularity."""
  runs = grid('fine_grained')
  law = FINE_GRAINED['E=64']
  loss = law(**runs) + rng.normal(0, 0.01, len(runs['N']))
  fit = fit_law(FORMS['fine_grained'], runs, loss, draws=40, seed=1)
  assert 0.008 < fit.rmse < 0.012
  assert fit.held_out_rmse < 0.02
  assert len(fit.draws) == 40
  for name in ('alpha', 'gamma', 'g'):
    low, high = fit.interval(name, 2, 98)
    assert low < getattr(law, name) < high
    assert high - low < getattr(law, name)


def test_bootstrap_samples_follow_the_seed(rng):
  runs = grid('chinchilla')
  loss = LAWS['chinchilla'](**runs) + rng.normal(0, 0.01, len(runs['N']))
  one, same, other = (
    fit_law(FORMS['chinchilla'], runs, loss, draws=3, seed=seed).draws for seed in (5, 5, 6)
  )
  assert one == same
  assert one != other


def test_one_wild_run_moves_a_huber_fit_little(rng):
  runs = grid('chinchilla')
  law = LAWS['chinchilla']
  loss = law(**runs) + rng.normal(0, 0.001, len(runs['N']))
  loss[7] += 0.5
  robust = fit_law(FORMS['chinchilla'], runs, loss, delta=1e-3, draws=0).law
  squares = fit_law(FORMS['chinchilla'], runs, loss, delta=1e3, draws=0).law
  errors = [np.sqrt(np.mean((fit(**runs) - law(**runs)) ** 2)) for fit in (robust, squares)]
  assert errors[0] < 0.001
  assert errors[1] > 10 * errors[0]


def test_the_runs_held_out_are_the_best_or_those_of_most_flops():
  runs = grid('chinchilla')
  loss = LAWS['chinchilla'](**runs)
  fit = fit_law(FORMS['chinchilla'], runs, loss, draws=0)
  assert loss[fit.held_out].max() <= loss[~fit.held_out].min()
  flops = runs['N'] * runs['D'] * runs['D']
  by_flops = fit_law(FORMS['chinchilla'], runs, loss, hold_out_by=flops, draws=0)
  assert flops[by_flops.held_out].min() >= flops[~by_flops.held_out].max()


@pytest.mark.parametrize(
  'name, needed',
  [('chinchilla', 8), ('clark', 9), ('fine_grained', 10), ('inference_optimal', 14), ('joint', 15)],
)
def test_too_few_runs_are_refused_with_the_number_that_is_needed(name, needed):
  assert FORMS[name].points_needed(0.2) == needed
  assert len(dataclasses.fields(FORMS[name].law)) + 1 <= needed * 0.8
  runs = {key: value[: needed - 1] for key, value in grid(name).items()}
  with pytest.raises(ValueError, match=f'{needed - 1} runs are too few .* at least {needed} runs'):
    fit_law(FORMS[name], runs, np.ones(needed - 1))


def test_what_a_law_cannot_see_is_refused():
  runs = grid('fine_grained')
  loss = LAWS['fine_grained'](**runs)
  with pytest.raises(ValueError, match='1 different values of D are too few'):
    fit_law(FORMS['fine_grained'], {**runs, 'D': np.full(90, 1e9)}, loss)
  with pytest.raises(ValueError, match='loss of a run is not a positive finite number'):
    fit_law(FORMS['fine_grained'], runs, np.where(np.arange(90) == 3, np.nan, loss))
