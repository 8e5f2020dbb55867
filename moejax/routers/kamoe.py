"""KAMoE: all experts, weighed by a gated residual network of splines (Inzirillo & Genet 2024, "A gated residual
Kolmogorov-Arnold networks for mixtures of experts")."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moejax.arrays import Context
from moejax.routers.affinity import TokenAffinity
from moejax.routers.dense import assign_all
from moejax.routers.router import Flags, Router
from moejax.routers.scorers import check_from_one
from moejax.transformer.linear import product

DEGREE = 3


class Splines(nnx.Module):
  """A Kolmogorov-Arnold layer: sums over inputs of learnt functions, `silu` and cubic splines on [-1, 1] (Liu et al.
  2024, "KAN: Kolmogorov-Arnold networks", section 2.2).

  Args:
    d_in, d_out: widths.
    cells: of the grid.
    rngs: source of the initial weights, variance 1 / fan-in; splines a tenth of that deviation.
  """

  def __init__(self, d_in: int, d_out: int, cells: int, *, rngs: nnx.Rngs):
    init = nnx.initializers.truncated_normal(d_in**-0.5)
    self.base = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))
    shape = (d_in * (cells + DEGREE), d_out)
    self.kernel = nnx.Param(0.1 * init(rngs.params(), shape, jnp.float32))
    self.cells = cells

  def __call__(self, x: Float[Array, '*batch width']) -> Float[Array, '*batch width_out']:
    base, kernel = (w[...].astype(x.dtype) for w in (self.base, self.kernel))
    basis = spline_basis(x, self.cells)
    return product(jax.nn.silu(x), base) + product(basis.reshape(*x.shape[:-1], -1), kernel)


def spline_basis(x: Float[Array, '*batch width'], cells: int) -> Float[Array, '*batch width basis']:
  """Values of the cells + 3 cubic B-splines on a uniform grid of [-1, 1] (Cox-de Boor recursion); they sum to one in
  there."""
  step = 2.0 / cells
  knots = -1 + step * jnp.arange(-DEGREE, cells + DEGREE + 1).astype(x.dtype)
  knots = knots.reshape((1,) * x.ndim + (-1,))
  x = x[..., None]
  value = ((x >= knots[..., :-1]) & (x < knots[..., 1:])).astype(x.dtype)
  for degree in range(1, DEGREE + 1):
    left = (x - knots[..., : -degree - 1]) / jnp.asarray(degree * step, x.dtype)
    right = (knots[..., degree + 1 :] - x) / jnp.asarray(degree * step, x.dtype)
    value = left * value[..., :-1] + right * value[..., 1:]
  return value


class ResidualGate(nnx.Module):
  """`relu((x * a) W)`, then the gated residual network `norm(z V + GLU(kan(kan(z))))`: one logit an expert.

  Args:
    d_model: D.
    num_experts: E.
    width: of the hidden layer.
    cells: see `Splines`.
    rngs: source of the initial weights; a is ones at first.
  """

  def __init__(self, d_model: int, num_experts: int, width: int, cells: int, *, rngs: nnx.Rngs):
    def kernel(d_in: int, d_out: int) -> nnx.Param:
      init = nnx.initializers.truncated_normal(d_in**-0.5)
      return nnx.Param(init(rngs.params(), (d_in, d_out), jnp.float32))

    self.scale = nnx.Param(jnp.ones(d_model, jnp.float32))
    self.project = kernel(d_model, width)
    self.first = Splines(width, width, cells, rngs=rngs)
    self.second = Splines(width, num_experts, cells, rngs=rngs)
    self.value, self.gate = kernel(num_experts, num_experts), kernel(num_experts, num_experts)
    self.skip = kernel(width, num_experts)
    self.norm_scale = nnx.Param(jnp.ones(num_experts, jnp.float32))
    self.offset = nnx.Param(jnp.zeros(num_experts, jnp.float32))

  def __call__(
    self, x_bsd: Float[Array, 'B S D'], context: Context
  ) -> tuple[Float[Array, 'B S E'], None]:
    """Logits."""
    wide = lambda weight: weight[...].astype(x_bsd.dtype)
    z = jax.nn.relu(product(x_bsd * wide(self.scale)[None, None], wide(self.project)))
    h = self.second(self.first(z))
    gate = jax.nn.sigmoid(product(h, wide(self.gate)))
    h = product(z, wide(self.skip)) + product(h, wide(self.value)) * gate
    h = h - h.mean(-1, keepdims=True)
    h = h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + jnp.asarray(1e-3, h.dtype))
    return h * wide(self.norm_scale)[None, None] + wide(self.offset)[None, None], None


def kamoe(
  *, d_model: int, num_experts: int, rngs: nnx.Rngs, width: int = 16, cells: int = 5
) -> Router:
  """`y = sum_e sigmoid(gate(x))_e F_e(x)`: every expert on every token, weights that do not sum to one.

  The released code has 3 experts and the same gate; sizes of grid and hidden layer are options there too.

  Args:
    d_model: D.
    num_experts: E, from 2: the normed logits of one would not depend on x.
    rngs: source of the initial weights.
    width: of the gate's hidden layer.
    cells: of the splines' grid.

  Raises:
    ValueError: width or cells below 1, a single expert.
  """
  check_from_one(width=width, cells=cells)
  if num_experts < 2:
    raise ValueError(f'num_experts={num_experts} with router kamoe: accepted are integers from 2')
  return Router(
    ResidualGate(d_model, num_experts, width, cells, rngs=rngs),
    TokenAffinity('sigmoid', num_experts),
    assign_all,
    num_experts=num_experts,
    flags=Flags(prefix_safe_train=True, prefix_safe_eval=True, batch_free=True),
    choices=num_experts,
  )
