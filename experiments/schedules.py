"""Learning rates as functions of the step, a jittable int or float; step 0 is the first update.

All share the linear warm-up `(step + 1) / warmup_steps`, so that the first update already moves. Ends count from the
last step: `(steps - step) / cooldown_steps`, so that the last update still moves. (The rules of big_vision utils.py
`create_learning_rate_schedule`, whose warm-up is `step / warmup_steps`: there the first update does nothing.)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.settings import OptimSettings

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]


def make_schedule(optim: OptimSettings, steps: int) -> Schedule:
  """The learning rate of `optim.schedule` for a run of `steps` updates, float32."""
  shape = {'constant': _constant, 'cosine': _cosine, 'trapezoid': _trapezoid, 'rsqrt': _rsqrt}
  factor = shape[optim.schedule]

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    now = jnp.asarray(step).astype(jnp.float32)
    warmup = jnp.minimum(1.0, (now + 1.0) / max(1, optim.warmup_steps))
    return optim.learning_rate * warmup * factor(now, optim, steps)

  return schedule


def _constant(step: jax.Array, optim: OptimSettings, steps: int) -> jax.Array:
  return jnp.ones_like(step)


def _cosine(step: jax.Array, optim: OptimSettings, steps: int) -> jax.Array:
  """Half a cosine from 1, when warm-up ends, to final_fraction at `steps` (Loshchilov & Hutter 2017, no restart)."""
  done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
  falling = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(done, 0.0, 1.0)))
  return optim.final_fraction + (1.0 - optim.final_fraction) * falling


def _trapezoid(step: jax.Array, optim: OptimSettings, steps: int) -> jax.Array:
  """Constant, then linear to final_fraction over the last cooldown_steps (Zhai et al. 2022; Hägele et al. 2024)."""
  left = jnp.clip((steps - step) / max(1, optim.cooldown_steps), 0.0, 1.0)
  return optim.final_fraction + (1.0 - optim.final_fraction) * left


def _rsqrt(step: jax.Array, optim: OptimSettings, steps: int) -> jax.Array:
  """1 / sqrt(1 + (step - warmup_steps) / timescale) after warm-up, times the trapezoid's cooldown.

  The form of big_vision with shift 0, which vmoe's runs use too; continuous where warm-up ends.
  """
  since = jnp.maximum(0.0, step - optim.warmup_steps)
  return _trapezoid(step, optim, steps) / jnp.sqrt(1.0 + since / optim.timescale)
