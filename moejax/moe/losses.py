"""Auxiliary losses: functions of `RoutingStats`, so exact over whatever batch the stats were summed.

The scope of a loss is the set of tokens whose stats were added up before the call: one call of a layer, the
whole batch over a mesh, or all microbatches of an accumulated step. `sequence_balance` alone is per sequence
whatever was added. Forms and values: f_e is the fraction of rows that wanted expert e (sums to one, no
gradient), P_e the mean probability (sums to one).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import entr
from jaxtyping import Array, Float

from moejax.arrays import RoutingStats


def balance(stats: RoutingStats) -> Float[Array, '']:
  """`E sum_e f_e P_e`: 1 when balanced, E / k when collapsed onto k experts.

  Switch, Fedus et al. 2021, equation 4, with f_e divided by k as in Megatron and DeepSeek-V3, so that one
  coefficient serves every k.
  """
  fraction_e = jax.lax.stop_gradient(_share(stats.chosen_e))
  return jnp.sum(fraction_e * _mean(stats.prob_e, stats)) * jnp.asarray(
    stats.prob_e.shape[-1], stats.prob_e.dtype
  )


def sequence_balance(stats: RoutingStats) -> Float[Array, '']:
  """`balance` of each sequence by itself, mean over tokens (DeepSeek-V3, equation 17)."""
  return _mean(stats.sequence_balance, stats)


def z(stats: RoutingStats) -> Float[Array, '']:
  """Mean squared log-partition function of the logits (ST-MoE, Zoph et al. 2022, equation 5)."""
  return _mean(stats.z, stats)


def importance(stats: RoutingStats) -> Float[Array, '']:
  """Squared coefficient of variation of the summed probabilities (Shazeer et al. 2017, equation 7).

  Of all probabilities as in V-MoE (Shazeer et al. sum the weights of the chosen); population variance as in both.
  """
  return _squared_cv(stats.prob_e)


def load(stats: RoutingStats) -> Float[Array, '']:
  """Squared coefficient of variation of the expected loads (Shazeer et al. 2017, equation 11).

  Has a gradient only when the router adds noise in training.
  """
  return _squared_cv(stats.load_e)


def entropy(stats: RoutingStats) -> Float[Array, '']:
  """Mean entropy of a token's probabilities, in nats; as a loss it makes choices more certain.

  Dynamic top-p routing, Huang et al. 2024, "Harder tasks need more experts".
  """
  return _mean(stats.entropy, stats)


def mutual_information(stats: RoutingStats) -> Float[Array, '']:
  """Mean entropy less the entropy of the mean: minus the mutual information of tokens and experts.

  Mod-Squad, Chen et al. 2022. In [-log E, 0]; 0 when all tokens have the same probabilities.
  """
  return entropy(stats) - entr(_mean(stats.prob_e, stats)).sum()


LOSSES: dict[str, Callable[[RoutingStats], Array]] = {
  'balance': balance,
  'entropy': entropy,
  'importance': importance,
  'load': load,
  'mutual_information': mutual_information,
  'sequence_balance': sequence_balance,
  'z': z,
}
"""Short name -> loss."""


def weighted_losses(stats: RoutingStats, coefficients: dict[str, float]) -> dict[str, Array]:
  """Name -> coefficient * loss.

  Raises:
    ValueError: an unknown name.
  """
  check_losses(coefficients)
  return {
    name: LOSSES[name](stats) * jnp.asarray(value, stats.z.dtype)
    for name, value in coefficients.items()
  }


def check_losses(coefficients: dict[str, float]) -> None:
  """Raises ValueError for a name that is not in `LOSSES`."""
  for name in coefficients:
    if name not in LOSSES:
      raise ValueError(f'loss {name!r}: accepted are {", ".join(LOSSES)}')


def _mean(total: Array, stats: RoutingStats) -> Array:
  return total / jnp.maximum(stats.tokens, 1)


def _share(count_e: Array) -> Array:
  return count_e / jnp.maximum(count_e.sum(-1, keepdims=True), 1e-20)


def _squared_cv(total_e: Array) -> Array:
  return total_e.var() / (total_e.mean() ** 2 + 1e-10)
