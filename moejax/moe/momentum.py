"""Momentum over depth: a mixture's output is a step, and steps remember those of the layers below.

Teo & Nguyen 2024, "MomentumSMoE: integrating momentum into sparse mixture of experts". A block adds what its mixture
returns, so that the paper's `x - p` is `x + p` here: the experts learn the sign.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.option_types import check_types

MOMENTUM, SQUARE = 'momentum', 'momentum_square'
"""Names in `Context.state`, both `[B, S, D]`, zero below the first mixture."""

State = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class HeavyBall:
  """`p = mu p + gamma u` (equation 11): the sum of all steps below, each layer's weighing mu times the next one's.

  Attributes:
    mu: 0.7 in the paper; with 0, and gamma 1, the plain layer.
    gamma: 1 in the paper.
  """

  mu: float = 0.7
  gamma: float = 1.0

  def initial_state(self, shape: tuple[int, ...], dtype) -> State:
    """Zeros."""
    return {MOMENTUM: jnp.zeros(shape, dtype)}

  def reads(self, x_bsd: Float[Array, 'B S D'], state: State) -> Float[Array, 'B S D']:
    """What the experts are applied to: x."""
    return x_bsd

  def __call__(
    self, step_bsd: Float[Array, 'B S D'], state: State
  ) -> tuple[Float[Array, 'B S D'], State]:
    """The output for the mixture's step u, and the state."""
    p_bsd = _scaled(self.mu, state[MOMENTUM]) + _scaled(self.gamma, step_bsd)
    return p_bsd, {MOMENTUM: p_bsd}


@dataclasses.dataclass(frozen=True)
class Adam:
  """`p = b1 p + (1 - b1) u`, `v = b2 v + (1 - b2) u^2`, output `gamma p / sqrt(v + 1e-8)` (AdamSMoE, section 3.3).

  The released code has this in the first layer and a heavy ball above, and cancels the residual there; here all layers
  are alike, and the residual is the block's.

  Attributes:
    b1, b2: 0.9 and 0.999 in the released code; both 0: the sign of u.
    gamma: size of the step.
  """

  b1: float = 0.9
  b2: float = 0.999
  gamma: float = 1.0

  def initial_state(self, shape: tuple[int, ...], dtype) -> State:
    """Zeros."""
    return {MOMENTUM: jnp.zeros(shape, dtype), SQUARE: jnp.zeros(shape, dtype)}

  def reads(self, x_bsd: Float[Array, 'B S D'], state: State) -> Float[Array, 'B S D']:
    """What the experts are applied to: x."""
    return x_bsd

  def __call__(
    self, step_bsd: Float[Array, 'B S D'], state: State
  ) -> tuple[Float[Array, 'B S D'], State]:
    """The output for the mixture's step u, and the state."""
    p_bsd = _scaled(self.b1, state[MOMENTUM]) + _scaled(1 - self.b1, step_bsd)
    v_bsd = _scaled(self.b2, state[SQUARE]) + _scaled(1 - self.b2, step_bsd * step_bsd)
    scale_bsd = jax.lax.rsqrt(v_bsd + jnp.asarray(1e-8, v_bsd.dtype))
    return _scaled(self.gamma, p_bsd * scale_bsd), {MOMENTUM: p_bsd, SQUARE: v_bsd}


@dataclasses.dataclass(frozen=True)
class Robust:
  """A heavy ball of which the step is taken ahead: u at `x + alpha gamma p`, `p = mu p + u`, output `gamma p`.

  The robust momentum method (Cyrus et al. 2018): with rate rho and conditioning kappa, and smoothness 1,
  `gamma = kappa (1 - rho)^2 (1 + rho)`, `mu = kappa rho^3 / (kappa - 1)` and
  `alpha = rho^3 / ((kappa - 1) (1 - rho)^2 (1 + rho))`. How the paper puts it into the layer was not seen in code:
  here the experts, and the router, read the normed tokens ahead, and the values of rho and kappa are ours.

  Attributes:
    rho: between 0 and 1.
    kappa: above 1.
  """

  rho: float = 0.4
  kappa: float = 2.0

  @property
  def gamma(self) -> float:
    """Size of the step."""
    return self.kappa * (1 - self.rho) ** 2 * (1 + self.rho)

  @property
  def mu(self) -> float:
    """What is left of the momentum."""
    return self.kappa * self.rho**3 / (self.kappa - 1)

  @property
  def alpha(self) -> float:
    """How far ahead."""
    return self.rho**3 / ((self.kappa - 1) * (1 - self.rho) ** 2 * (1 + self.rho))

  def initial_state(self, shape: tuple[int, ...], dtype) -> State:
    """Zeros."""
    return {MOMENTUM: jnp.zeros(shape, dtype)}

  def reads(self, x_bsd: Float[Array, 'B S D'], state: State) -> Float[Array, 'B S D']:
    """What the experts are applied to: the point ahead."""
    return (x_bsd + _scaled(self.alpha * self.gamma, state[MOMENTUM])).astype(x_bsd.dtype)

  def __call__(
    self, step_bsd: Float[Array, 'B S D'], state: State
  ) -> tuple[Float[Array, 'B S D'], State]:
    """The output for the mixture's step u, and the state."""
    p_bsd = _scaled(self.mu, state[MOMENTUM]) + step_bsd
    return _scaled(self.gamma, p_bsd), {MOMENTUM: p_bsd}


Momentum = HeavyBall | Adam | Robust
MOMENTA: dict[str, type[HeavyBall] | type[Adam] | type[Robust]] = {
  'heavy_ball': HeavyBall,
  'adam': Adam,
  'robust': Robust,
}
"""Short name -> momentum."""


def make_momentum(options: str | Mapping[str, Any]) -> Momentum:
  """A momentum by its short name, or `{'name': ..., **options}`.

  Raises:
    ValueError: an unknown name or option, or one out of its range.
  """
  values: dict[str, Any] = {'name': options} if isinstance(options, str) else dict(options)
  name = values.pop('name', None)
  if name not in MOMENTA:
    raise ValueError(f'momentum name={name!r}: accepted are {", ".join(map(repr, MOMENTA))}')
  fields = [field.name for field in dataclasses.fields(MOMENTA[name])]
  for key, value in values.items():
    if key not in fields:
      raise ValueError(f'option {key!r} of momentum {name!r}: accepted are {", ".join(fields)}')
    check_types(f'momentum {name!r}', MOMENTA[name], {key: value})
    if key == 'kappa' and not value > 1:
      raise ValueError(f'momentum kappa={value}: accepted are numbers above 1')
    if key in ('mu', 'b1', 'b2', 'rho') and not 0 <= value < 1:
      raise ValueError(f'momentum {key}={value}: accepted are numbers from 0 to below 1')
  return MOMENTA[name](**values)


def _scaled(factor: float, x: Array) -> Array:
  return jnp.asarray(factor, x.dtype) * x
