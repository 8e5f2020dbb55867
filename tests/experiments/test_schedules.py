"""Learning rates at points computed by hand."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import common
from experiments.schedules import make_schedule
from experiments.settings import Settings


def _optim(**changes):
  optim = Settings.from_config(common.get_config()).optim
  usual = {'learning_rate': 2.0, 'warmup_steps': 4, 'cooldown_steps': 0, 'final_fraction': 0.0}
  return dataclasses.replace(optim, **{**usual, **changes})


@pytest.mark.parametrize(
  'changes, steps, points',
  [
    # warm-up in four equal parts, the first update included
    ({'schedule': 'constant'}, 100, {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0, 99: 2.0}),
    ({'schedule': 'constant', 'warmup_steps': 0}, 100, {0: 2.0, 99: 2.0}),
    # 4 + 8 steps: a third, a half and two thirds of the way down, and the end
    (
      {'schedule': 'cosine'},
      12,
      {
        4: 2.0,
        6: 1 + math.cos(math.pi / 4),
        8: 1.0,
        10: 1 - math.cos(math.pi / 4),
        12: 0.0,
        20: 0.0,
      },
    ),
    ({'schedule': 'cosine', 'final_fraction': 0.1}, 12, {4: 2.0, 8: 1.1, 12: 0.2}),
    # the last of four cooldown updates still has a quarter
    (
      {'schedule': 'trapezoid', 'cooldown_steps': 4},
      20,
      {0: 0.5, 4: 2.0, 16: 2.0, 17: 1.5, 19: 0.5, 20: 0.0, 30: 0.0},
    ),
    (
      {'schedule': 'trapezoid', 'cooldown_steps': 4, 'final_fraction': 0.5},
      20,
      {16: 2.0, 18: 1.5, 20: 1.0},
    ),
    # timescale 12: 1 / sqrt(1 + 12 / 12) after 12 steps, half after 36
    (
      {'schedule': 'rsqrt', 'timescale': 12.0},
      100,
      {0: 0.5, 4: 2.0, 16: 2 / math.sqrt(2), 40: 1.0, 99: 2 / math.sqrt(1 + 95 / 12)},
    ),
    (
      {'schedule': 'rsqrt', 'timescale': 12.0, 'cooldown_steps': 4},
      42,
      {38: 2 / math.sqrt(1 + 34 / 12), 40: 0.5, 42: 0.0},
    ),
  ],
)
def test_the_rate_at_hand_computed_steps(changes, steps, points):
  schedule = make_schedule(_optim(**changes), steps)
  for step, rate in points.items():
    np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-7, err_msg=str(step))


@pytest.mark.parametrize('name', ['constant', 'cosine', 'trapezoid', 'rsqrt'])
def test_no_update_of_a_run_has_rate_zero_and_a_jitted_step_counter_will_do(name):
  schedule = make_schedule(_optim(schedule=name, cooldown_steps=3), 10)
  steps = jax.numpy.arange(10, dtype=jax.numpy.int32)
  rates = jax.jit(schedule)(steps)
  assert rates.dtype == np.float32
  assert (np.asarray(rates) > 0).all()


def test_a_run_shorter_than_its_warmup_stays_in_it():
  schedule = make_schedule(_optim(schedule='cosine', warmup_steps=100), 10)
  np.testing.assert_allclose(schedule(9), 2.0 * 10 / 100, rtol=1e-6)
