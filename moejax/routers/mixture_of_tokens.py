"""Mixture of Tokens: experts work on mixtures of tokens at the same position of several sequences (Antoniak et al.
2023, "Mixture of tokens: continuous MoE through cross-example aggregation")."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context, Scores, SoftPlan
from moejax.routers.expert_choice import from_groups, to_groups
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import check_from_one
from moejax.routers.soft import slot_affinity
from moejax.routers.top_k import check_name


class MixtureScorer(nnx.Module):
  """`logits = x W / temperature`, one for every mixture of every expert.

  Args:
    d_model: D.
    num_experts: E.
    slots: P, mixtures of an expert.
    temperature: small ones make a mixture a single token.
    rngs: source of the initial kernel, truncated normal with variance 1 / D.
  """

  def __init__(
    self, d_model: int, num_experts: int, slots: int, temperature: float, *, rngs: nnx.Rngs
  ):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (d_model, num_experts, slots), jnp.float32))
    self.temperature = temperature

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E P'], None]:
    """Logits of the mixtures."""
    logits = jnp.einsum('BSD,DEP->BSEP', x_bsd, self.kernel[...].astype(x_bsd.dtype))
    return logits / jnp.asarray(self.temperature, logits.dtype), None


@dataclasses.dataclass(frozen=True)
class MixAcross:
  """`Scores -> SoftPlan` with softmax over the tokens of a group.

  Attributes:
    group_size, eval_group_size: sequences of a group, in training and outside of it.
    emit: see `mixture_of_tokens`.
  """

  group_size: int
  eval_group_size: int
  emit: str

  def __call__(self, scores: Scores, context: Context) -> SoftPlan:
    size = self.group_size if context.train else self.eval_group_size
    logits = scores.select
    shape = (logits.shape[0], logits.shape[1])
    mask = None if context.mask is None else context.mask[..., None, None]
    where = None if mask is None else to_groups(mask, 'position', size)
    grouped = jax.nn.softmax(to_groups(logits, 'position', size), 1, where=where)
    dispatch = from_groups(grouped, 'position', shape)
    combine = dispatch if self.emit == 'same' else jax.nn.softmax(logits, (-2, -1))
    if mask is not None:
      dispatch, combine = jnp.where(mask, dispatch, 0), jnp.where(mask, combine, 0)
    return SoftPlan(dispatch, combine, across=size)


def mixture_of_tokens(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  group_size: int = 8,
  eval_group_size: int | None = None,
  slots: int = 1,
  temperature: float = 1.0,
  emit: str = 'same',
) -> Router:
  """Mixtures of the tokens at one position of g sequences; every token takes all experts' outputs back.

  No token sees later ones of its sequence, but all see the others of their group. An expert costs what a dense layer
  of width F does if it is g F / (E P) wide, as there are E P mixtures for g tokens. A variant of the paper, a learnt
  temperature, is not here; its step to a sparse layer ("transition tuning") takes the kernel as that of `top_k`.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial kernel.
    group_size: g, consecutive sequences of the batch (of all sequences where there are fewer); has to divide them.
    eval_group_size: g outside of training; default `group_size`. 1 mixes nothing, for single sequences: weights are
      then 1, where in training they are 1 / g on average.
    slots: P, mixtures of an expert; the paper finds more to be better.
    temperature: of the softmax, 1 in the paper.
    emit: weights with which tokens take outputs: 'same', those of the mixture, or 'softmax' over experts.

  Raises:
    ValueError: an option out of its range; when called, sequences that g does not divide.
  """
  eval_group_size = group_size if eval_group_size is None else eval_group_size
  check_from_one(group_size=group_size, eval_group_size=eval_group_size, slots=slots)
  if not temperature > 0:
    raise ValueError(f'temperature={temperature}: accepted are positive numbers')
  check_name('emit', emit, ('same', 'softmax'))
  return Router(
    MixtureScorer(d_model, num_experts, slots, temperature, rngs=rngs),
    slot_affinity,
    MixAcross(group_size, eval_group_size, emit),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True,
      prefix_safe_eval=True,
      batch_free=group_size == eval_group_size == 1,
      stays_in_sequence=False,
    ),
    choices=num_experts * slots / group_size,
  )
