"""Feed-forward experts: gather the rows, apply each row's expert, add the weighted rows at their tokens."""

import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from .. import compat, packed, registry
from ..activations import check_activation
from .reference import expert_ffn as _reference

NAMES = ('ampere', 'blocks', 'cpu', 'gpu', 'reference', 'tpu')


class _Static(NamedTuple):
  """What the compiled program depends on besides shapes."""

  activation: str
  implementation: str | None
  groups: int


def expert_ffn(
  x: Float[Array, 'T D'],
  assignment: Any,
  w_gate: Float[Array, 'E D F'] | None,
  w_up: Float[Array, 'E D F'],
  w_down: Float[Array, 'E F D'],
  *,
  activation: str,
  implementation: str | None = None,
) -> Float[Array, 'T D']:
  """The weighted sum of each token's experts.

  `y[t] = sum over rows r with token[r] == t and expert[r] < E of weight[r] * ffn_{expert[r]}(x[t])`, with
  `ffn_e(x) = (act(x w_gate[e]) * (x w_up[e])) w_down[e]`, or `act(x w_up[e]) w_down[e]` without `w_gate`.
  Sums are kept in float32 or wider; y has the type of x.

  Args:
    x: tokens.
    assignment: a record with `token [R]` int32, `expert [R]` int32 (`E` means dropped), `weight [R]`,
      `num_experts` and `groups`; `groups == T` promises that row r is of token `r // (R // T)`.
    w_gate, w_up, w_down: the weights of all experts.
    activation: a name in activations.ACTIVATIONS.
    implementation: one of `NAMES`, or None for the best one of the platform lowered for.

  Gradients flow to x, weight and the three w. Dropped rows are zero in value and gradient; a token that has
  no kept row is never read in an operation that mixes tokens, so a NaN in it stays where it is. Inside
  `shard_map` the result varies over every mesh axis that any argument varies over.

  Raises:
    ValueError: an unknown activation or implementation, or shapes that do not belong together.
    Unsupported: a type narrower than 16 bits, or no floating type; for 'tpu' see tpu.check, for 'gpu' gpu.check, for
      'ampere' ampere.forward.
  """
  check_activation(activation)
  registry.check_name('expert_ffn', implementation, NAMES)
  registry.check_dtypes('expert_ffn', x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
  _check_shapes(x, assignment, w_gate, w_up, w_down)
  if implementation == 'reference' or not assignment.token.shape[0]:
    return _reference(x, assignment, w_gate, w_up, w_down, activation=activation)
  rows = (assignment.token, assignment.expert, assignment.weight)
  arguments = compat.vary_together(x, *rows, w_gate, w_up, w_down)
  return _expert_ffn(_Static(activation, implementation, assignment.groups), *arguments)


def _check_shapes(x, assignment, w_gate, w_up, w_down):
  num_experts, (num_tokens, d_model), d_ff = assignment.num_experts, x.shape, w_up.shape[-1]
  wanted = {'w_gate': (w_gate, (num_experts, d_model, d_ff))}
  wanted |= {'w_up': (w_up, (num_experts, d_model, d_ff))}
  wanted |= {'w_down': (w_down, (num_experts, d_ff, d_model))}
  for name, (w, shape) in wanted.items():
    if w is not None and w.shape != shape:
      raise ValueError(f'{name}.shape={w.shape}, expected {shape}')
  num_rows = assignment.token.shape[0]
  if assignment.groups == num_tokens and num_rows % max(num_tokens, 1):
    raise ValueError(f'groups=T={num_tokens} (token-major) does not divide {num_rows} rows')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expert_ffn(static, x, token, expert, weight, w_gate, w_up, w_down):
  return _forward(static, False, x, token, expert, weight, w_gate, w_up, w_down)[0]


def _forward(static, save, x, token, expert, weight, w_gate, w_up, w_down):
  plan = packed.sort_rows(expert, w_up.shape[0])
  into = (w_up,) if w_gate is None else (w_gate, w_up)
  # A body saves its pre-activations in an order of its own, in an array whose shape all bodies that may run share.
  shape = static.implementation, token.shape[0], w_up.shape[0]
  saved = registry.largest(__name__, 'saved_rows', *shape) if save else 0
  options = dict(activation=static.activation, groups=static.groups, save=saved)
  rows = (token, weight, plan)
  args = (x, *rows, into, w_down)
  y, pre = registry.run(__name__, 'forward', static.implementation, *args, **options)
  return y, (x, *rows, into, w_down, pre)


def _backward(static, residuals, dy):
  options = dict(activation=static.activation, groups=static.groups)
  args = (*residuals, dy)
  found = registry.run(__name__, 'backward', static.implementation, *args, **options)
  dx, dweight, dinto, ddown = found
  dgate = dinto[0] if len(dinto) == 2 else None
  return dx, None, None, dweight, dgate, dinto[-1], ddown


_expert_ffn.defvjp(lambda static, *args: _forward(static, True, *args), _backward)
