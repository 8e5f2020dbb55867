"""SMoE-Dropout: a random router that is never trained, and more and more experts a token (Chen et al. 2023, "Sparse
MoE as the new dropout: scaling dense and self-slimmable transformers")."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import Frozen
from moejax.routers.top_k import TopKAssign
from moejax.routers.weighting import normalised
from moejax.transformer.linear import product


class FrozenScorer(nnx.Module):
  """`logits = x W` with a kernel that no optimizer sees.

  Args:
    d_model: D.
    num_experts: E.
    rngs: source of the kernel, truncated normal with variance 1 / D.
  """

  def __init__(self, d_model: int, num_experts: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_model**-0.5)
    self.kernel = Frozen(init(rngs.params(), (d_model, num_experts), jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits; their gradient reaches x alone."""
    return product(x_bsd, self.kernel[...].astype(x_bsd.dtype)), None


@dataclasses.dataclass(frozen=True)
class Ramp:
  """`k_min + round((k_max - k_min) * progress)`, half to even; outside of training `eval_k`.

  Attributes:
    k_min, k_max: at the start and the end of training.
    eval_k: choices in evaluation.
  """

  k_min: int
  k_max: int
  eval_k: int

  def __call__(self, context: Context) -> Array:
    if not context.train:
      return jnp.asarray(self.eval_k, jnp.int32)
    progress = jnp.asarray(1.0 if context.progress is None else context.progress, jnp.float32)
    rise = jnp.round(jnp.asarray(self.k_max - self.k_min, jnp.float32) * progress)
    return self.k_min + rise.astype(jnp.int32)


def smoe_dropout(
  *,
  d_model: int,
  num_experts: int,
  rngs: nnx.Rngs,
  k_min: int | None = None,
  k_max: int | None = None,
  eval_k: int | None = None,
) -> Router:
  """Top-k by a frozen random projection, weights a softmax over the chosen, k rising linearly over training.

  No balance loss. `context.progress` says how far training is, so that a resumed run goes on with its k. The model is
  meant to be evaluated with any k; evaluation during training has `eval_k` too. Experts are slices of the dense layer:
  with k = E the layer costs what a dense layer of E times an expert's width does.

  Args:
    d_model: D.
    num_experts: E, 16 in the paper.
    rngs: source of the frozen kernel.
    k_min: at the start; default E / 2 as in the released script.
    k_max: at the end; default E.
    eval_k: in evaluation; default k_max.

  Raises:
    ValueError: k out of its range.
  """
  k_min = max(1, num_experts // 2) if k_min is None else k_min
  k_max = num_experts if k_max is None else k_max
  eval_k = k_max if eval_k is None else eval_k
  if not 1 <= k_min <= k_max <= num_experts:
    raise ValueError(
      f'k_min={k_min}, k_max={k_max} with num_experts={num_experts}: accepted are 1 <= k_min <= k_max <= {num_experts}'
    )
  if not 1 <= eval_k <= num_experts:
    raise ValueError(
      f'eval_k={eval_k} with num_experts={num_experts}: accepted are 1 to {num_experts}'
    )
  return Router(
    FrozenScorer(d_model, num_experts, rngs=rngs),
    TokenAffinity('softmax', k_max),
    TopKAssign(max(k_max, eval_k), normalised, active=Ramp(k_min, k_max, eval_k)),
    num_experts=num_experts,
    flags=Flags(
      prefix_safe_train=True, prefix_safe_eval=True, batch_free=True, trains_router=False
    ),
    choices=(k_min + k_max) / 2,
  )
