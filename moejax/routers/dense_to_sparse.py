"""Dense-to-Sparse gate of EvoMoE: all experts at the start of training, one at its end.

Nie et al. 2021, "EvoMoE: an evolutional mixture-of-experts training framework via dense-to-sparse gate".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.router import Flags, Router
from moejax.routers.rows import token_rows
from moejax.routers.scorers import LinearScorer, context_key

DECAYS = ('linear', 'exponential')


@dataclasses.dataclass(frozen=True)
class DenseToSparse:
  """The schedule, as affinity; `assign` reads it too.

  Attributes:
    tau_max, tau_min: temperature at the start of training and at the switch.
    decay: 'linear' or 'exponential' between the two.
    switch_at: fraction of the steps after which one expert works on a token.
    threshold: experts of a probability above it are chosen.
    tempered: weights are the noisy, tempered probabilities; else the plain ones.
    gumbel: whether there is noise.
  """

  tau_max: float
  tau_min: float
  decay: str
  switch_at: float
  threshold: float
  tempered: bool
  gumbel: bool

  def temperature(self, progress: Float[Array, '']) -> Float[Array, '']:
    """tau after a fraction of the training steps."""
    done = jnp.clip(progress / max(self.switch_at, 1e-9), 0, 1)
    if self.decay == 'linear':
      return self.tau_max + (self.tau_min - self.tau_max) * done
    return self.tau_max * (self.tau_min / self.tau_max) ** done

  def hard(self, context: Context) -> Array:
    """Whether one expert is chosen: outside of training, and after the switch."""
    if not context.train or context.progress is None:
      return jnp.asarray(True)
    return context.progress >= self.switch_at

  def __call__(
    self, logits_bse: Array, std: Array | None, bias_e: Array | None, context: Context
  ) -> Scores:
    probs_bse = jax.nn.softmax(logits_bse, -1)
    if not context.train or context.progress is None:
      return Scores(logits_bse, probs_bse, probs_bse, probs_bse)
    noisy_bse = logits_bse
    if self.gumbel:
      key = context_key(context, 2, 'gumbel=True')
      noisy_bse = logits_bse + jax.random.gumbel(key, logits_bse.shape, logits_bse.dtype)
    tau = self.temperature(context.progress).astype(logits_bse.dtype)
    soft_bse = jax.nn.softmax(noisy_bse / tau, -1)
    hard = self.hard(context)
    select_bse = jnp.where(hard, probs_bse, soft_bse)
    gate_bse = select_bse if self.tempered else probs_bse
    return Scores(logits_bse, select_bse, gate_bse, probs_bse)

  def assign(self, scores: Scores, context: Context) -> Assignment:
    """Rows of falling probability, E a token in training and one outside of it; the first is always kept."""
    num_experts = scores.select.shape[-1]
    k = num_experts if context.train else 1
    select_bsk, expert_bsk = jax.lax.top_k(scores.select, k)
    first_k = jnp.arange(k) == 0
    above_bsk = select_bsk > jnp.asarray(self.threshold, select_bsk.dtype)
    kept_bsk = first_k[None, None] | (above_bsk & ~self.hard(context))
    weight_bsk = jnp.take_along_axis(scores.gate, expert_bsk, -1)
    return token_rows(expert_bsk, weight_bsk, kept_bsk, num_experts, context)


def dense_to_sparse(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  tau_max: float = 2.0,
  tau_min: float = 0.3,
  decay: str = 'linear',
  switch_at: float = 1.0,
  threshold: float = 0.001,
  tempered: bool = True,
  gumbel: bool = True,
  init_std: float | None = None,
) -> Router:
  """`pi = softmax((x W + Gumbel noise) / tau)`; in training all experts of `pi > threshold`, weights pi.

  tau falls with `context.progress`, and the experts of a token with it. From `switch_at` on, and outside of training,
  it is top-1 without noise: Switch. Weights are not normalised. The rest of EvoMoE, one expert that is trained
  first and then copied and perturbed, is surgery and not part of the router.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial router kernel.
    tau_max, tau_min: temperature at the start and at the switch.
    decay: 'linear' or 'exponential' in the steps.
    switch_at: fraction of the training steps, of `context.progress`; 1 for no switch before the end.
    threshold: 0.001 in the released code. The most probable expert is chosen whatever the threshold.
    tempered: False for weights softmax(x W), the other form in the released code.
    gumbel: False for no noise.
    init_std: see `LinearScorer`.

  Raises:
    ValueError: an option out of its range.
  """
  if not 0 < tau_min <= tau_max:
    raise ValueError(f'tau_min={tau_min}, tau_max={tau_max}: accepted are 0 < tau_min <= tau_max')
  if decay not in DECAYS:
    raise ValueError(f'decay={decay!r}: accepted are {", ".join(map(repr, DECAYS))}')
  for key, value in (('switch_at', switch_at), ('threshold', threshold)):
    if not 0 <= value <= 1:
      raise ValueError(f'{key}={value}: accepted are numbers from 0 to 1')
  gate = DenseToSparse(tau_max, tau_min, decay, switch_at, threshold, tempered, gumbel)
  return Router(
    LinearScorer(d_model, num_experts, init_std=init_std, rngs=rngs),
    gate,
    gate.assign,
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
  )
