"""RAPHAEL's two mixtures: experts by the step of the diffusion, and experts by the words of the prompt.

Xue et al. 2023, "RAPHAEL: text-to-image generation via large mixture of diffusion paths", section 3.1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Assignment, Context, Scores
from moejax.routers.router import Flags, Router, required, with_flags
from moejax.routers.rows import token_rows
from moejax.routers.scorers import check_from_one, context_key
from moejax.routers.top_k import check_name, token_choice
from moejax.routers.weighting import raw, unweighted

WEIGHTS = {'softmax_topk': raw, 'unweighted': unweighted}


class TimeScorer(nnx.Module):
  """`silu(f(t) W_1) W_2`, f sines and cosines of the time; equal for all tokens of a sequence.

  Args:
    num_experts: E.
    width: of f, even, and of the hidden layer.
    noise_std: of the noise on the logits in training.
    rngs: source of the initial kernels, variance 1 / fan-in.
  """

  def __init__(self, num_experts: int, width: int, noise_std: float, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(width**-0.5)
    self.project = nnx.Param(init(rngs.params(), (width, width), jnp.float32))
    self.kernel = nnx.Param(init(rngs.params(), (width, num_experts), jnp.float32))
    self.noise_std = noise_std

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits, noise included.

    Raises:
      ValueError: without `context.time`; with noise in training without `context.rng`.
    """
    time_b = required(context, 'time', 'time_moe').astype(x_bsd.dtype)
    project, kernel = (w[...].astype(x_bsd.dtype) for w in (self.project, self.kernel))
    half = project.shape[0] // 2
    rate = jnp.exp(jnp.linspace(0.0, 4.0, half, dtype=x_bsd.dtype))  # periods of 6 to a tenth
    angle = time_b[:, None] * rate[None]
    wave = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
    logits = jax.nn.silu(wave @ project) @ kernel  # [B, E]: one decision a sequence
    logits = noisy(logits, self.noise_std, context, 'time_moe')
    return jnp.broadcast_to(logits[:, None], (*x_bsd.shape[:2], logits.shape[-1])), None


def noisy(logits: Array, std: float, context: Context, name: str) -> Array:
  """Logits with Gaussian noise in training."""
  if not (context.train and std):
    return logits
  noise = jax.random.normal(context_key(context, 7, name), logits.shape, logits.dtype)
  return logits + jnp.asarray(std, logits.dtype) * noise


def time_moe(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 1,
  width: int = 32,
  noise_std: float = 0.0,
  **options,
) -> Router:
  """Top-k by the step of the diffusion, `context.time`: all tokens of an image go the same way.

  The paper has 4 experts, k = 1 and noise on the probabilities in training (here on the logits; its size is not
  published). How the chosen expert is weighed it leaves open: here by its probability, so that the gate learns, or
  `weighting='unweighted'`. DiT-MoE (Fei et al. 2024) has no such gate: time enters by the modulation of the token, and
  its router is `top_k` with `weighting='softmax_topk'` and two shared experts.

  Args:
    d_model: unused.
    num_experts: E.
    rngs: source of the initial kernels.
    k: choices of a sequence.
    width: of the features of time, even.
    noise_std: of the noise on the logits in training.
    options: of `token_choice`.

  Raises:
    ValueError: an odd width, or as `token_choice`; when called, no `context.time`.
  """
  if width < 2 or width % 2:
    raise ValueError(f'width={width}: accepted are even integers from 2')
  scorer = TimeScorer(num_experts, width, noise_std, rngs=rngs)
  router = token_choice(scorer, num_experts=num_experts, k=k, **options)
  return with_flags(router, needs=('time',))


class TextScorer(nnx.Module):
  """Logits `[B, N, E]` of the text tokens.

  Args:
    width: of `context.text`.
    num_experts: E.
    noise_std: of the noise on the logits in training.
    rngs: source of the initial kernel, variance 1 / fan-in.
  """

  def __init__(self, width: int, num_experts: int, noise_std: float, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(width**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (width, num_experts), jnp.float32))
    self.noise_std = noise_std

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B N E'], None]:
    """Logits, noise included.

    Raises:
      ValueError: without `context.text`; with noise in training without `context.rng`.
    """
    text = required(context, 'text', 'space_moe').astype(x_bsd.dtype)
    required(context, 'maps', 'space_moe')
    logits = text @ self.kernel[...].astype(x_bsd.dtype)
    return noisy(logits, self.noise_std, context, 'space_moe'), None


def text_affinity(
  logits_bne: Array, std: Array | None, bias_e: Array | None, context: Context
) -> Scores:
  """Choices are of text tokens, `[B, N, E]`; statistics of an image token are means over all text tokens."""
  probs_bne = jax.nn.softmax(logits_bne, -1)
  num_positions = required(context, 'maps', 'space_moe').shape[-1]

  def spread(value_bne: Array) -> Array:
    mean = value_bne.mean(1, keepdims=True)
    return jnp.broadcast_to(mean, (mean.shape[0], num_positions, mean.shape[2]))

  return Scores(spread(logits_bne), logits_bne, probs_bne, spread(probs_bne))


@dataclasses.dataclass(frozen=True)
class MapAssign:
  """Every text token sends the positions that it attends to, to its expert, `1 / N` of the output each.

  Attributes:
    weighting: a name of WEIGHTS.
    threshold: of the map's largest value, above which a position counts.
  """

  weighting: str
  threshold: float

  def __call__(self, scores: Scores, context: Context) -> Assignment:
    num_experts = scores.select.shape[-1]
    maps_bns = required(context, 'maps', 'space_moe').astype(scores.gate.dtype)
    if context.mask is not None:
      maps_bns = jnp.where(context.mask[:, None], maps_bns, 0)
    limit = jnp.asarray(self.threshold, maps_bns.dtype) * maps_bns.max(-1, keepdims=True)
    seen_bns = maps_bns > limit
    chosen_bne = jax.nn.one_hot(scores.select.argmax(-1), num_experts, dtype=scores.gate.dtype)
    weight_bne = WEIGHTS[self.weighting](scores.gate) * chosen_bne / maps_bns.shape[1]
    seen_bns = seen_bns.astype(weight_bne.dtype)
    weight_bse = jnp.einsum('BNS,BNE->BSE', seen_bns, weight_bne)
    wanted_bse = jnp.einsum('BNS,BNE->BSE', seen_bns, chosen_bne) > 0
    expert_bse = jnp.broadcast_to(
      jnp.arange(num_experts, dtype=jnp.int32)[None, None], weight_bse.shape
    )
    return token_rows(expert_bse, weight_bse, wanted_bse, num_experts, context)


def space_moe(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  width: int = 32,
  threshold: float = 0.2,
  weighting: str = 'softmax_topk',
  noise_std: float = 0.0,
) -> Router:
  """`h = (1 / N) sum over text tokens n of e_n(h' * mask_n)`, e_n the expert that token n chooses (equation 3).

  mask_n is where `context.maps` of the token, its cross-attention, exceeds a part of its largest value. An expert
  without offsets gives zero for what is masked, so that tokens with one expert share its rows and their weights add up.
  The paper has 6 experts in 16 layers, threshold 0.2, and no weight in its equation: 'unweighted'; by default an expert
  counts with its probability here, so that the gate learns.

  Args:
    d_model: unused.
    num_experts: E.
    rngs: source of the initial kernel.
    width: of `context.text`.
    threshold: between 0 and 1.
    weighting: 'softmax_topk' or 'unweighted'.
    noise_std: of the noise on the logits in training.

  Raises:
    ValueError: an option out of its range; when called, no `context.text` or `context.maps`.
  """
  check_name('weighting', weighting, WEIGHTS)
  if not 0 <= threshold < 1:
    raise ValueError(f'threshold={threshold}: accepted are numbers from 0 to below 1')
  check_from_one(width=width)
  return Router(
    TextScorer(width, num_experts, noise_std, rngs=rngs),
    text_affinity,
    MapAssign(weighting, threshold),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True,
      prefix_safe_eval=True,
      batch_free=True,
      trains_router=weighting != 'unweighted',
      needs=('text', 'maps'),
      needs_past=True,  # a map's largest value
    ),
  )
