"""Auxiliary losses: functions of `RoutingStats`, so exact over whatever batch the stats were summed.

The scope of a loss is the set of tokens whose stats were added up before the call: one call of a layer, the
whole batch over a mesh, or all microbatches of an accumulated step. `sequence_balance` alone is per sequence
whatever was added, and `locality` alone asks where in its batch a sequence stands. Forms and values: f_e is the
fraction of rows that wanted expert e (sums to one, no gradient), P_e the mean probability (sums to one).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moejax.arrays import RoutingStats
from moejax.moe.entropy import entropy_terms


def balance(stats: RoutingStats) -> Float[Array, '']:
  """`E sum_e f_e P_e`: 1 when balanced, E / k when collapsed onto k experts.

  Switch, Fedus et al. 2021, equation 4, with f_e divided by k as in Megatron and DeepSeek-V3, so that one
  coefficient serves every k.
  """
  return _agreement(_share(stats.chosen_e), _mean(stats.prob_e, stats))


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
  return entropy(stats) - entropy_terms(_mean(stats.prob_e, stats)).sum()


def cost_balance(stats: RoutingStats) -> Float[Array, '']:
  """`E sum_e c_e f_e P_e` with the relative costs c_e of the experts (all 1: `balance`).

  The heterogeneous loss of MoE++ (Jin et al. 2024): c = 1 for feed-forward experts and tau for those without
  computation; the paper's `sum eta_e f_e P_e`, whose f_e is not divided by k, is k / E times this. The parameter
  penalty of HMoE (Wang et al. 2024), c = width over mean width, is k times this.
  """
  prob_e = _mean(stats.prob_e, stats)
  if stats.cost_e is not None:
    prob_e = prob_e * _mean(stats.cost_e, stats)
  return _agreement(_share(stats.chosen_e), prob_e)


def cluster_balance(stats: RoutingStats) -> Float[Array, '']:
  """`balance` between clusters of experts, wherever in a cluster a token goes.

  Device-level loss of DeepSeekMoE (Dai et al. 2024, section 3.3); between nodes in SMILE (He et al. 2022).
  """
  share_g, prob_g = (_clusters(v, stats).sum(1) for v in (_share(stats.chosen_e), stats.prob_e))
  return _agreement(share_g, _mean(prob_g, stats))


def member_balance(stats: RoutingStats) -> Float[Array, '']:
  """`balance` between the places in a cluster, whichever cluster a token goes to: within nodes in SMILE."""
  share_e, prob_e = (_clusters(v, stats).sum(0) for v in (_share(stats.chosen_e), stats.prob_e))
  return _agreement(share_e, _mean(prob_e, stats))


def cluster_variance(stats: RoutingStats) -> Float[Array, '']:
  """`E` times the mean over clusters of the sample variance of P_e within (MoEC, Xie et al. 2022, coefficient type
  1; with one cluster type 0).

  The released code sums probabilities over tokens where this takes the mean, so that the coefficient does not
  depend on the batch.
  """
  prob_ge = _clusters(_mean(stats.prob_e, stats), stats)
  variance_g = prob_ge.var(1, ddof=1 if prob_ge.shape[1] > 1 else 0)
  return variance_g.mean() * jnp.asarray(prob_ge.size, prob_ge.dtype)


def cluster_contrast(stats: RoutingStats) -> Float[Array, '']:
  """`cluster_variance / exp(d)`: small within clusters, and d large between (MoEC, coefficient type 2).

  d is the mean of the |cluster| largest P_e less that of the next ones.
  """
  variance = cluster_variance(stats)
  if stats.clusters == 1:
    return variance
  ordered_e = -jnp.sort(-_mean(stats.prob_e, stats))
  mean_g = _clusters(ordered_e, stats).mean(1)
  return variance * jnp.exp(mean_g[1] - mean_g[0])


def locality(stats: RoutingStats) -> Float[Array, '']:
  """KL divergence between where the router sends the tokens and the fully local distribution: 0 when every token
  stays with the cluster of experts that its sequence lies with, log G when all clusters are as probable.

  LocMoE, Li et al. 2024, `mu KL(D_c || D_l)`, D_c current and D_l local; mu is not published. Here D_c and D_l are
  distributions of (home, cluster) over all tokens, and the divergence is `KL(D_l || D_c)`, the mean over tokens of
  `-log` of what those of a home give to their own cluster: the other way round it is infinite unless all stay at home.
  Scope: all tokens whose stats were added. Which cluster is home, see `RoutingStats`; zero with a single cluster.
  """
  if stats.home_g is None or stats.local_g is None:
    return jnp.zeros_like(stats.z)
  own_g = jnp.maximum(stats.local_g / jnp.maximum(stats.home_g, 1), 1e-20)
  return _mean(-jnp.sum(stats.home_g * jnp.log(own_g)), stats)


def load_concentration(stats: RoutingStats) -> Float[Array, '']:
  """Entropy of the mean probabilities, in nats: as a loss it empties experts, for pruning.

  ModuleFormer, Shen et al. 2023.
  """
  return entropy_terms(_mean(stats.prob_e, stats)).sum()


def sparsity(stats: RoutingStats) -> Float[Array, '']:
  """Mean L1 norm of a token's probabilities scaled to unit L2 norm: 1 when certain (SpeechMoE, You et al. 2021)."""
  return _mean(stats.sparsity, stats)


def importance_square(stats: RoutingStats) -> Float[Array, '']:
  """`E sum_e P_e^2`: 1 when the mean probabilities are equal (mean importance of SpeechMoE, You et al. 2021)."""
  prob_e = _mean(stats.prob_e, stats)
  return jnp.sum(prob_e * prob_e) * jnp.asarray(prob_e.shape[-1], prob_e.dtype)


def guidance(stats: RoutingStats) -> Float[Array, '']:
  """Mean cross-entropy of the router's probabilities with what it is told: super-class guidance of Mobile V-MoEs.

  Daxberger et al. 2023, equation 2; of the router `image` with `context.task`, zero without. Of `spatial` with a
  quantile it is the routing classification loss (Dryden & Hoefler 2022), whose value is 0 and whose gradient is not.
  """
  return jnp.zeros_like(stats.z) if stats.guidance is None else _mean(stats.guidance, stats)


LOSSES: dict[str, Callable[[RoutingStats], Array]] = {
  'balance': balance,
  'cluster_balance': cluster_balance,
  'cluster_contrast': cluster_contrast,
  'cluster_variance': cluster_variance,
  'cost_balance': cost_balance,
  'entropy': entropy,
  'guidance': guidance,
  'importance': importance,
  'importance_square': importance_square,
  'load': load,
  'load_concentration': load_concentration,
  'locality': locality,
  'member_balance': member_balance,
  'mutual_information': mutual_information,
  'sequence_balance': sequence_balance,
  'sparsity': sparsity,
  'z': z,
}
"""Short name -> loss."""

# Certain or uncertain choices, full or empty experts: either may be what is wanted
_EITHER_SIGN = ('entropy', 'load_concentration', 'mutual_information', 'sparsity')


def weighted_losses(stats: RoutingStats, coefficients: dict[str, float]) -> dict[str, Array]:
  """Name -> coefficient * loss.

  Raises:
    ValueError: as `check_losses`.
  """
  check_losses(coefficients)
  return {
    name: LOSSES[name](stats) * jnp.asarray(value, stats.z.dtype)
    for name, value in coefficients.items()
  }


def check_losses(coefficients: dict[str, float]) -> None:
  """Raises ValueError for a name that is not in `LOSSES`, or a coefficient that no training could use."""
  for name, value in coefficients.items():
    if name not in LOSSES:
      raise ValueError(f'loss {name!r}: accepted are {", ".join(LOSSES)}')
    if isinstance(value, jax.Array):  # of a caller who makes it anew each step
      continue
    least = -math.inf if name in _EITHER_SIGN else 0
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < least:
      which = 'finite numbers' if name in _EITHER_SIGN else 'finite numbers from 0'
      raise ValueError(f'losses[{name!r}]={value!r}: accepted are {which}')


def _mean(total: Array, stats: RoutingStats) -> Array:
  return total / jnp.maximum(stats.tokens, 1)


def _share(count_e: Array) -> Array:
  return count_e / jnp.maximum(count_e.sum(-1, keepdims=True), 1e-20)


def _agreement(share_e: Array, prob_e: Array) -> Array:
  """`E sum_e f_e P_e`, the gradient through P alone."""
  total = jnp.sum(jax.lax.stop_gradient(share_e) * prob_e)
  return total * jnp.asarray(prob_e.shape[-1], prob_e.dtype)


def _clusters(value_e: Array, stats: RoutingStats) -> Array:
  """`[E] -> [G, E / G]`: clusters by their places."""
  return value_e.reshape(stats.clusters, -1)


def _squared_cv(total_e: Array) -> Array:
  return total_e.var() / (total_e.mean() ** 2 + 1e-10)
