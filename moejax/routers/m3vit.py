"""Task routers: every task has a gate of its own, all else is shared (Liang et al. 2022, "M3ViT: mixture-of-experts
vision transformer for efficient multi-task learning with model-accelerator co-design")."""

from __future__ import annotations

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Router, required, with_flags
from moejax.routers.scorers import check_from_one, check_key
from moejax.routers.top_k import check_name, token_choice
from moejax.transformer.linear import product

GATES = ('own', 'embedding')


class TaskScorer(nnx.Module):
  """`x W_task`, or `[x; e_task] W` with a learnt embedding of the task.

  Args:
    d_model: D.
    num_experts: E.
    tasks: how many.
    gate: 'own' or 'embedding'.
    width: of the embedding.
    noise_std: see `LinearScorer`.
    rngs: source of the initial kernels (variance 1 / fan-in) and embeddings (normal).
  """

  def __init__(
    self,
    d_model: int,
    num_experts: int,
    *,
    tasks: int,
    gate: str,
    width: int,
    noise_std: float,
    rngs: nnx.Rngs,
  ):
    d_in = d_model + (width if gate == 'embedding' else 0)
    gates = () if gate == 'embedding' else (tasks,)
    init = nnx.initializers.truncated_normal(d_in**-0.5)
    self.kernel = nnx.Param(init(rngs.params(), (*gates, d_in, num_experts), jnp.float32))
    normal = nnx.initializers.normal(1.0)
    embedding = normal(rngs.params(), (tasks, width), jnp.float32)
    self.embedding = nnx.Param(embedding) if gate == 'embedding' else None
    self.noise_std = noise_std

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], Float[Array, ''] | None]:
    """Logits and the standard deviation of their noise.

    Raises:
      ValueError: without `context.task`; with noise in training without `context.rng`.
    """
    task_b = required(context, 'task', 'm3vit')
    kernel = self.kernel[...].astype(x_bsd.dtype)
    if self.embedding is None:
      logits_bse = jnp.einsum('BSD,BDE->BSE', x_bsd, kernel[task_b])
    else:
      width = x_bsd.shape[-1]
      known = self.embedding[...].astype(x_bsd.dtype)[task_b] @ kernel[width:]
      logits_bse = product(x_bsd, kernel[:width]) + known[:, None]
    if not (context.train and self.noise_std):
      return logits_bse, None
    check_key(context, 'm3vit')
    return logits_bse, jnp.asarray(self.noise_std / kernel.shape[-1], x_bsd.dtype)


def m3vit(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k: int = 2,
  tasks: int = 2,
  gate: str = 'own',
  width: int = 16,
  noise_std: float = 1.0,
  weighting: str = 'softmax_topk',
  **options,
) -> Router:
  """Top-k token choice by a gate of the task that `context.task` names (section 3.2 of the paper).

  Of one task this is V-MoE's router (noise 1 / E, softmax weights as they are); its losses are `importance` and `load`.
  In inference with one task only the experts that its gate chooses need loading. The released code initialises gates by
  Kaiming's rule; the sizes of embeddings are ours. A task beyond the last is taken as the last.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the initial parameters.
    k: choices of a token.
    tasks: how many.
    gate: 'own', a kernel for each task (`multi_gate` of the released code); 'embedding', one kernel that sees an
      embedding of the task beside the token.
    width: of the embedding.
    noise_std: see `LinearScorer`.
    weighting, options: of `token_choice`.

  Raises:
    ValueError: tasks or width below 1, an unknown gate, or as `token_choice`; when called, no `context.task`.
  """
  check_name('gate', gate, GATES)
  check_from_one(tasks=tasks, width=width)
  scorer = TaskScorer(
    d_model, num_experts, tasks=tasks, gate=gate, width=width, noise_std=noise_std, rngs=rngs
  )
  affinity = functools.partial(TokenAffinity, one_threshold=True)  # V-MoE's
  router = token_choice(
    scorer, num_experts=num_experts, k=k, affinity=affinity, weighting=weighting, **options
  )
  return with_flags(router, needs=('task',))
