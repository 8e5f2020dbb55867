"""Fitting a law to runs: least Huber loss from a grid of starts, and what the fit is worth.

Sources: Hoffmann et al. 2022 (approach 3), Krajewski et al. 2024 (section 5), Ludziejewski et al. 2025 (appendix),
Yun et al. 2024 (appendix D). We deviate in three things: starting scales follow from starting exponents by
non-negative least squares; the search is Levenberg-Marquardt in place of (L-)BFGS, for the valleys of these laws are
long and it follows them in few evaluations; and no weight decay pulls at the coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from moejax.scaling.forms import Form, Logs
from moejax.scaling.laws import Law, effective_experts

_POLISHED = 8  # starts that are followed to their end: those of the least objective
_FAR_END = 12.0  # likewise for what stands for the ends of Ehat, so that these stay apart
_OVERFLOW = 60.0  # exponents beyond count as this much: a start that is far off stays finite
# Of the numbers that are fitted: logarithms of scales and ends, and exponents.
_WALLS = {'scale': (-6.0, 30.0), 'exponent': (-10.0, 10.0), 'end': (-6.0, 8.0)}
_FLOOR = 1e-3  # a scale that least squares make zero starts at this part of the mean loss


@dataclasses.dataclass(frozen=True)
class Huber:
  """What is minimised: `delta` ends the quadratic part, in nats, or in log loss with `on_log`."""

  delta: float
  on_log: bool


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law.

  Attributes:
    law: fitted to all runs.
    rmse, max_error: of its loss in nats, over these runs.
    held_out: True for runs, `[runs]`, that a second fit did not see.
    held_out_law: that second fit.
    held_out_rmse: of that fit on the runs it did not see, nats.
    draws: fits to resampled runs.
  """

  law: Law
  rmse: float
  max_error: float
  held_out: np.ndarray
  held_out_law: Law
  held_out_rmse: float
  draws: tuple[Law, ...]

  def interval(self, name: str, low: int = 10, high: int = 90) -> tuple[float, float]:
    """Percentiles of a coefficient over the draws."""
    values = [getattr(law, name) for law in self.draws]
    return float(np.percentile(values, low)), float(np.percentile(values, high))


def fit_law(
  form: Form,
  runs: Mapping[str, np.ndarray],
  loss: np.ndarray,
  *,
  delta: float | None = None,
  on_log: bool | None = None,
  hold_out: float = 0.2,
  hold_out_by: np.ndarray | None = None,
  draws: int = 100,
  seed: int = 0,
) -> Fit:
  """Fits a law to runs, to the runs without the best ones, and to resampled runs.

  Args:
    form: an entry of FORMS.
    runs: column -> `[runs]`, positive; `form.columns` at least.
    loss: `[runs]`, finite and positive, nats.
    delta, on_log: see `Huber`; None for the paper's.
    hold_out: fraction of the runs that the second fit does not see.
    hold_out_by: `[runs]`; the runs where it is largest are held out. None: those of least loss.
    draws: bootstrap samples of as many runs, with replacement.
    seed: of the samples.

  Raises:
    ValueError: too few runs or values of a column for this law, or values that are not positive and finite.
  """
  columns = {name: np.asarray(runs[name], np.float64) for name in form.columns}
  loss = np.asarray(loss, np.float64)
  check_runs(form, columns, loss, hold_out)
  huber = Huber(form.delta if delta is None else delta, form.on_log if on_log is None else on_log)
  law = _fit(form, columns, loss, huber)
  error = law(**columns) - loss

  count = max(1, round(hold_out * len(loss)))
  order = np.argsort(-loss if hold_out_by is None else np.asarray(hold_out_by), kind='stable')
  held_out = np.zeros(len(loss), bool)
  held_out[order[len(loss) - count :]] = True
  seen = {name: value[~held_out] for name, value in columns.items()}
  partial = _fit(form, seen, loss[~held_out], huber, near=law)
  missed = (partial(**columns) - loss)[held_out]

  rng = np.random.default_rng(seed)
  samples = (rng.integers(0, len(loss), len(loss)) for _ in range(draws))
  return Fit(
    law,
    rmse=_rms(error),
    max_error=float(np.abs(error).max()),
    held_out=held_out,
    held_out_law=partial,
    held_out_rmse=_rms(missed),
    draws=tuple(
      _polish(form, {k: v[rows] for k, v in columns.items()}, loss[rows], huber, [law], False)
      for rows in samples
    ),
  )


def check_runs(
  form: Form, columns: Mapping[str, np.ndarray], loss: np.ndarray, hold_out: float
) -> None:
  """ValueError with one sentence where a law cannot be fitted to these runs."""
  if not 0 < hold_out < 1:
    raise ValueError(f'hold_out={hold_out}: accepted is a fraction between 0 and 1')
  name, needed = form.law.__name__, form.points_needed(hold_out)
  if len(loss) < needed:
    raise ValueError(
      f'{len(loss)} runs are too few for {name}: its {len(form.names)} coefficients need at least {needed} runs, '
      f'{hold_out:.0%} of them held out'
    )
  for column, values in {**columns, 'loss': loss}.items():
    if not (np.isfinite(values) & (values > 0)).all():
      raise ValueError(f'{column} of a run is not a positive finite number, which {name} needs')
    distinct = len(np.unique(values))
    if distinct < form.least.get(column, 0):
      raise ValueError(
        f'{distinct} different values of {column} are too few for {name}: accepted are '
        f'{form.least[column]} or more'
      )


def _fit(form: Form, columns: Logs, loss: np.ndarray, huber: Huber, near: Law | None = None) -> Law:
  starts = [_started(form, columns, loss, start) for start in form.starts()]
  return _polish(form, columns, loss, huber, starts if near is None else [near, *starts])


def _started(form: Form, columns: Logs, loss: np.ndarray, start: Mapping[str, float]) -> Law:
  """A law with these exponents and the scales of least squares."""
  from scipy.optimize import nnls

  unit = form.law(**{**dict.fromkeys(form.scales, 1.0), **start})
  basis = _Problem(form, columns, loss, Huber(1.0, False)).exponentials(encode(form, unit))
  scales, _ = nnls(basis.T / loss[:, None], np.ones_like(loss)) if form.scales else ([], 0)
  floors = _FLOOR * loss.mean() / basis.mean(1)
  owners = [next(name for name in term if name in form.scales) for term in _named(form, columns)]
  found = {
    name: float(max(scale, floor))
    for name, scale, floor in zip(owners, scales, floors, strict=False)
  }
  return form.law(**{**start, **found})


def _named(form: Form, columns: Logs) -> list[dict[str, np.ndarray]]:
  if not form.scales:
    return []
  return form.terms({name: np.zeros(1) for name in ('N', 'D', 'G', 'Ehat')})


def _polish(
  form: Form,
  columns: Logs,
  loss: np.ndarray,
  huber: Huber,
  starts: list[Law],
  precise: bool = True,
) -> Law:
  """The best end of the searches from the best starts: all of these loosely, then the two best ends precisely."""
  problem = _Problem(form, columns, loss, huber)
  thetas = sorted((encode(form, law) for law in starts), key=lambda theta: problem(theta)[0])
  ends = [_descend(problem, theta, precise=False) for theta in thetas[:_POLISHED]]
  ends.sort(key=lambda end: end[0])
  if precise:
    ends = [_descend(problem, theta, precise=True) for _, theta in ends[:2]]
  return decode(form, min(ends, key=lambda end: end[0])[1])


def _descend(problem: _Problem, theta: np.ndarray, precise: bool) -> tuple[float, np.ndarray]:
  """Levenberg-Marquardt: Gauss-Newton steps, damped until the objective falls."""
  value, gradient = problem(theta)
  damping, calm = 1e-3, 0
  for _ in range(400 if precise else 100):
    jacobian = problem.jacobian(theta)
    curvature = jacobian.T @ jacobian
    diagonal = np.diag(np.diag(curvature) + 1e-12 * np.trace(curvature) + 1e-300)
    while damping < 1e12:
      step = np.linalg.solve(curvature + damping * diagonal, -gradient)
      new, new_gradient = problem(theta + step)
      if new < value:
        break
      damping *= 4
    else:
      break
    calm = calm + 1 if value - new <= (1e-9 if precise else 1e-5) * value else 0
    theta, value, gradient, damping = theta + step, new, new_gradient, max(damping / 5, 1e-13)
    if calm == 3 or value < 1e-18:
      break
  return value, theta


class _Problem:
  """Mean Huber loss over delta squared of one law and its runs; a call gives value and gradient."""

  def __init__(self, form: Form, columns: Logs, loss: np.ndarray, huber: Huber):
    self.form, self.loss, self.huber = form, loss, huber
    self.experts, self.bends, self.linear = columns.get('E'), form.bends, form.linear
    logs = {name: np.log(values) for name, values in columns.items() if name != 'E'}
    at_zero, at_one = (
      self._design({**logs, 'Ehat': np.full(len(loss), value)}) for value in (0.0, 1.0)
    )
    self.base, self.slope = at_zero, at_one - at_zero  # [terms, runs, coefficients]
    kinds = ['scale' if name in form.scales else 'exponent' for name in form.linear]
    limits = [_WALLS[kind] for kind in kinds + ['end', 'end'] * self.bends]
    self.walls = tuple(np.array(side) for side in zip(*limits, strict=True))

  def _design(self, logs: Logs) -> np.ndarray:
    none = np.zeros_like(self.loss)
    return np.array(
      [[term.get(name, none) for name in self.linear] for term in self.form.terms(logs)]
    ).transpose(0, 2, 1)

  def exponentials(self, theta: np.ndarray) -> np.ndarray:
    """`[terms, runs]`, whose sum over terms is the predicted loss."""
    return self._parts(theta)[0]

  def _parts(self, theta: np.ndarray):
    """The exponentials, and d exponent / d theta `[terms, runs, coefficients]`."""
    count = len(self.linear)
    design = self.base
    if self.bends:
      log, log_by_ends = _log_experts(self.experts, theta[count:])
      design = self.base + log[:, None] * self.slope
      by_log = self.slope @ theta[:count]  # [terms, runs]
      through_ends = by_log[:, :, None] * log_by_ends[None]
    exponents = (design @ theta[:count]).clip(-_OVERFLOW, _OVERFLOW)
    if self.bends:
      design = np.concatenate([design, through_ends], axis=2)
    return np.exp(exponents), design

  def _residuals(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Residuals `[runs]` over delta, and their derivatives `[runs, coefficients]`."""
    exponentials, design = self._parts(theta)
    predicted = exponentials.sum(0)
    slope = np.einsum('jr,jrc->rc', exponentials, design)
    if self.huber.on_log:
      residual, slope = np.log(predicted / self.loss), slope / predicted[:, None]
    else:
      residual = predicted - self.loss
    return residual / self.huber.delta, slope / self.huber.delta

  def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
    residual, slope = self._residuals(theta)
    size, outside = np.abs(residual), self._outside(theta)
    value = np.where(size <= 1, residual**2 / 2, size - 0.5).mean() + outside @ outside / 2
    return float(value), residual.clip(-1, 1) @ slope / len(residual) + outside

  def _outside(self, theta: np.ndarray) -> np.ndarray:
    """How far each number is outside of its walls: what the runs do not determine ends there, not at infinity."""
    return theta - theta.clip(*self.walls)

  def jacobian(self, theta: np.ndarray) -> np.ndarray:
    """Derivatives of the residuals, those in the linear part at the weight that they have."""
    residual, slope = self._residuals(theta)
    weight = 1 / np.sqrt(np.maximum(1, np.abs(residual)) * len(residual))
    return np.concatenate([slope * weight[:, None], np.diag(self._outside(theta) != 0)])


def _log_experts(E: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """log Ehat `[runs]`, and its derivatives `[runs, 2]` by the two numbers that stand for its ends.

  E_start = 1 + exp(first), E_max = E_start + exp(second), so that any numbers are ends.
  """
  first, second = np.exp(ends.clip(-_FAR_END, _FAR_END))
  start, most = 1 + first, 1 + first + second
  effective = effective_experts(E, start, most)
  offset = start * most / (most - start)
  bent = (offset / (E - 1 + offset)) ** 2  # -d(1 / Ehat) / d(1 / offset)
  by_start = effective * bent / start**2
  by_most = effective * (1 - bent) / most**2
  return np.log(effective), np.stack([(by_start + by_most) * first, by_most * second], axis=1)


def encode(form: Form, law: Law) -> np.ndarray:
  """The numbers that are fitted: scales in logarithms, then what stands for the ends of Ehat."""
  theta = [
    np.log(getattr(law, name)) if name in form.scales else getattr(law, name)
    for name in form.linear
  ]
  if form.bends:
    start, most = (getattr(law, name) for name in ('E_start', 'E_max'))
    theta += [np.log(start - 1), np.log(most - start)]
  return np.array(theta, np.float64)


def decode(form: Form, theta: np.ndarray) -> Law:
  """The law of `encode`."""
  values = {
    name: float(np.exp(value) if name in form.scales else value)
    for name, value in zip(form.linear, theta, strict=False)
  }
  if form.bends:
    first, second = np.exp(theta[-2:].clip(-_FAR_END, _FAR_END))
    values |= {'E_start': float(1 + first), 'E_max': float(1 + first + second)}
  return form.law(**values)


def _rms(error: np.ndarray) -> float:
  return float(np.sqrt(np.mean(error**2)))
