"""A gated layer in the manner of ScatterMoE (arXiv 2403.08245), in Triton, as a contestant of bench_kernels.py.

One kernel multiplies rows by the matrix of their expert and may gather the rows it reads and scatter those it writes;
a second one sums the gradients of weights. The activation and the weighted sum are torch's, and what the experts give
is kept for the backward, as there. Our own code, with tiles chosen from a few by their time.

`python scripts/bench_triton.py` compares it with a loop over experts in torch; TRITON_INTERPRET=1 does so without a GPU
(`pip install torch triton`).
"""

import functools
import os
import statistics
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from bench_torch import Done
from torch.nn import functional

ROWS = 128  # of a block, all of one expert


class Config(NamedTuple):
  """Columns and contracted depth of a tile, warps, and stages of the pipeline."""

  columns: int
  depth: int
  warps: int
  stages: int


CONFIGS = (
  Config(128, 32, 4, 4),
  Config(128, 64, 8, 3),
  Config(256, 64, 8, 3),
)  # the first is ScatterMoE's


@triton.jit
def _multiply(
  x, w, y, order, block_expert, block_first, block_end,
  depth, width, x_row, w_expert, w_row, w_column, y_row,
  CHOICES: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, EVEN: tl.constexpr,
  ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
  """`y[r] = x[r] @ w[expert of r]` for the rows of one block and a tile of columns."""
  column_tile, block = tl.program_id(0), tl.program_id(1)
  expert = tl.load(block_expert + block).to(tl.int64)
  first, end = tl.load(block_first + block), tl.load(block_end + block)
  if first >= end:
    return
  row = first + tl.arange(0, ROWS)
  inside = row < end
  place = tl.load(order + row, mask=inside, other=0)
  source = place // CHOICES if GATHER else tl.where(inside, row, first)
  target = place if SCATTER else row
  column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
  k = tl.arange(0, DEPTH)
  a_at = x + source[:, None].to(tl.int64) * x_row + k[None, :]
  b_at = w + expert * w_expert + k[:, None].to(tl.int64) * w_row + column[None, :] * w_column
  total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
  for at in range(0, depth, DEPTH):
    if EVEN:
      a, b = tl.load(a_at), tl.load(b_at)
    else:
      deep = at + k < depth
      a = tl.load(a_at, mask=deep[None, :], other=0.0)
      b = tl.load(b_at, mask=deep[:, None] & (column < width)[None, :], other=0.0)
    total = tl.dot(a, b, total, input_precision='ieee')
    a_at += DEPTH
    b_at += DEPTH * w_row
  y_at = y + target[:, None].to(tl.int64) * y_row + column[None, :]
  tl.store(y_at, total.to(y.dtype.element_ty), mask=inside[:, None] & (column < width)[None, :])


@triton.jit
def _sum_products(
  x, g, dw, order, expert_first, expert_end,
  height, width, x_row, g_row,
  CHOICES: tl.constexpr, GATHER: tl.constexpr,
  HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
  """`dw[e] = sum over rows r of expert e of x[r]^T g[r]`, one tile of it; an expert without rows gets zeros."""
  expert = tl.program_id(2).to(tl.int64)
  i = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
  j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
  first, end = tl.load(expert_first + expert), tl.load(expert_end + expert)
  total = tl.zeros((HEIGHT, COLUMNS), dtype=tl.float32)
  for at in range(first, end, DEPTH):
    row = at + tl.arange(0, DEPTH)
    inside = row < end
    source = row
    if GATHER:
      source = tl.load(order + row, mask=inside, other=0) // CHOICES
    a_at = x + source[None, :].to(tl.int64) * x_row + i[:, None]
    b_at = g + row[:, None].to(tl.int64) * g_row + j[None, :]
    a = tl.load(a_at, mask=inside[None, :] & (i < height)[:, None], other=0.0)
    b = tl.load(b_at, mask=inside[:, None] & (j < width)[None, :], other=0.0)
    total = tl.dot(a, b, total, input_precision='ieee')
  dw_at = dw + expert * height * width + i[:, None].to(tl.int64) * width + j[None, :]
  mask = (i < height)[:, None] & (j < width)[None, :]
  tl.store(dw_at, total.to(dw.dtype.element_ty), mask=mask)


class Layout(NamedTuple):
  """Rows sorted by expert.

  Attributes:
    order: `[R]`, row at each sorted position.
    first, end: `[E]`, sorted positions of each expert.
    blocks: expert, first and end of each block of ROWS rows; unused blocks end where they begin.
    choices: K.
  """

  order: torch.Tensor
  first: torch.Tensor
  end: torch.Tensor
  blocks: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
  choices: int


def lay_out(expert, num_experts, choices) -> Layout:
  """Of `expert [T * K]`, token by token; nothing waits for the device."""
  order = torch.argsort(expert, stable=True).to(torch.int32)
  count = torch.zeros(num_experts, dtype=torch.int64, device=expert.device)
  count.scatter_add_(0, expert.long(), torch.ones_like(expert, dtype=torch.int64))
  end = torch.cumsum(count, 0)
  used = (count + ROWS - 1) // ROWS
  after = torch.cumsum(used, 0)
  block = torch.arange(expert.numel() // ROWS + num_experts, device=expert.device)
  of = torch.searchsorted(after, block, right=True).clamp(max=num_experts - 1)
  first = (end - count)[of] + (block - (after - used)[of]) * ROWS
  inside = block < after[-1]
  zero = torch.zeros_like(first)
  blocks = of, torch.where(inside, first, zero), torch.where(inside, end[of], zero)
  short = lambda x: x.to(torch.int32).contiguous()
  return Layout(order, short(end - count), short(end), tuple(map(short, blocks)), choices)


def multiply(x, w, layout, config, *, gather=False, scatter=False):
  """`[R, N]` of rows `x` and `w [E, K, N]`, of any strides; rows gathered from tokens, scattered to their choices."""
  num_rows, (_, depth, width) = layout.order.numel(), w.shape
  y = torch.empty((num_rows, width), dtype=x.dtype, device=x.device)
  columns = min(config.columns, max(16, triton.next_power_of_2(width)))
  even = depth % config.depth == 0 and width % columns == 0
  grid = (triton.cdiv(width, columns), layout.blocks[0].numel())
  _multiply[grid](
    x, w, y, layout.order, *layout.blocks,
    depth, width, x.stride(0), *w.stride(), y.stride(0),
    CHOICES=layout.choices, GATHER=gather, SCATTER=scatter, EVEN=even,
    ROWS=ROWS, COLUMNS=columns, DEPTH=config.depth,
    num_warps=config.warps, num_stages=config.stages,
  )  # fmt: skip
  return y


def sum_products(x, g, layout, num_experts, config, *, gather=False):
  """`[E, K, N]`: the gradient of weights that took `x` to what `g` is the gradient of."""
  height, width = x.shape[1], g.shape[1]
  dw = torch.empty((num_experts, height, width), dtype=x.dtype, device=x.device)
  grid = (triton.cdiv(width, 128), triton.cdiv(height, 128), num_experts)
  _sum_products[grid](
    x, g, dw, layout.order, layout.first, layout.end,
    height, width, x.stride(0), g.stride(0),
    CHOICES=layout.choices, GATHER=gather, HEIGHT=128, COLUMNS=128, DEPTH=config.depth,
    num_warps=config.warps, num_stages=config.stages,
  )  # fmt: skip
  return dw


class Layer(torch.autograd.Function):
  """`y [T, D]` of x, the weights of choices `[T * K]`, `w_into [E, D, 2 F]` (gate, then up) and `w_down [E, F, D]`."""

  @staticmethod
  def forward(ctx, x, weight, w_into, w_down, expert, config):
    choices = expert.numel() // x.shape[0]
    layout = lay_out(expert, w_down.shape[0], choices)
    pre = multiply(x, w_into, layout, config, gather=True)
    gate, up = pre.chunk(2, dim=1)
    hidden = functional.silu(gate) * up
    y = multiply(hidden, w_down, layout, config, scatter=True).view(x.shape[0], choices, -1)
    ctx.save_for_backward(x, weight, w_into, w_down, pre, hidden, y)
    ctx.layout, ctx.config = layout, config
    return torch.bmm(weight.view(-1, 1, choices).to(x.dtype), y)[:, 0]

  @staticmethod
  def backward(ctx, dout):
    x, weight, w_into, w_down, pre, hidden, y = ctx.saved_tensors
    layout, config, experts = ctx.layout, ctx.config, w_down.shape[0]
    dweight = torch.bmm(y, dout[:, :, None]).view(-1).to(weight.dtype)
    place = layout.order.long()
    dy = dout[place // layout.choices] * weight[place, None].to(dout.dtype)
    dhidden = multiply(dy, w_down.transpose(1, 2), layout, config)
    dw_down = sum_products(hidden, dy, layout, experts, config)
    gate, up = pre.chunk(2, dim=1)
    share = torch.sigmoid(gate)
    active = gate * share
    dpre = torch.cat([dhidden * up * (share + active * (1 - share)), dhidden * active], dim=1)
    dw_into = sum_products(x, dpre, layout, experts, config, gather=True)
    dx = multiply(dpre, w_into.transpose(1, 2), layout, config, scatter=True)
    dx = dx.view(x.shape[0], layout.choices, -1).sum(dim=1)
    return dx, dweight, dw_into, dw_down, None, None


def inputs(tokens, width, hidden, experts, choices, *, dtype, device, expert=None):
  """x, weight, w_into and w_down, random and trained, and the experts of each token."""
  torch.manual_seed(0)
  normal = lambda *shape: (torch.randn(shape, device=device) * shape[-2] ** -0.5).to(dtype)
  if expert is None:
    scores = torch.rand((tokens, experts), device=device)
    expert = scores.topk(choices, dim=1).indices.reshape(-1)
  weight = torch.rand(tokens * choices, device=device)
  trained = normal(tokens, width), weight, normal(experts, width, 2 * hidden)
  trained += (normal(experts, hidden, width),)
  return [one.requires_grad_() for one in trained], expert.to(device=device, dtype=torch.int32)


def contestants(arguments) -> dict:
  """`{'triton': {'forward', 'both'}}` of the fastest tiles, for the shapes and experts of ffn_operation's arguments.

  Empty without CUDA.
  """
  if not torch.cuda.is_available():
    return {}
  (tokens, width), (experts, _, hidden) = arguments[0].shape, arguments[2].shape
  expert = torch.tensor(arguments[5].tolist(), dtype=torch.int32)
  shape = tokens, width, hidden, experts, expert.numel() // tokens
  trained, expert = inputs(*shape, dtype=torch.bfloat16, device='cuda', expert=expert)
  dout = torch.randn_like(trained[0])

  def forward(config):
    with torch.no_grad():
      return Layer.apply(*trained, expert, config)

  def both(config):
    return torch.autograd.grad(Layer.apply(*trained, expert, config), trained, dout)

  config = fastest(both)
  parts = {'forward': forward, 'both': both}
  queued = lambda part: functools.partial(Done, functools.partial(part, config))
  return {'triton': {name: queued(part) for name, part in parts.items()}}


def fastest(run) -> Config:
  """The config with the least median time; those that ask for more shared memory than there is are passed over."""
  times, refusal = {}, None
  for config in CONFIGS:
    try:
      run(config)
    except triton.runtime.errors.OutOfResources as error:
      refusal = error
      continue
    times[config] = statistics.median(timed(functools.partial(run, config)) for _ in range(5))
  if not times:
    raise RuntimeError('no tiles fit') from refusal
  return min(times, key=times.get)


def timed(run) -> float:
  """Milliseconds of one call."""
  begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  begin.record()
  run()
  end.record()
  torch.cuda.synchronize()
  return begin.elapsed_time(end)


def by_loop(x, weight, w_into, w_down, expert):
  """The definition: a loop over experts, differentiated by torch."""
  choices = expert.numel() // x.shape[0]
  y = torch.zeros_like(x)
  for e in range(w_down.shape[0]):
    rows = (expert == e).nonzero()[:, 0]
    token = rows // choices
    gate, up = (x[token] @ w_into[e]).chunk(2, dim=1)
    product = (functional.silu(gate) * up) @ w_down[e]
    y = y.index_add(0, token, product * weight[rows, None])
  return y


def check(device, dtype, config, *, shape=(90, 48, 40, 5, 3), empty=True) -> float:
  """The largest deviation of value or gradients from the loop in float64, relative to the largest entry."""
  trained, expert = inputs(*shape, dtype=dtype, device=device)
  if empty:  # expert 1 has no rows, expert 0 more than a block
    expert = torch.where(expert == 1, 0, expert).to(torch.int32)
  wide = [one.detach().double().requires_grad_() for one in trained]
  y, wanted = Layer.apply(*trained, expert, config), by_loop(*wide, expert)
  dout = torch.sin(wanted.detach())
  found = y.detach(), *torch.autograd.grad(y, trained, dout.to(dtype))
  wanted = wanted.detach(), *torch.autograd.grad(wanted, wide, dout)
  far = [
    float((f.double() - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)
  ]
  return max(far)


def main() -> int:
  """Prints the deviations; the number of those that are too large."""
  on_gpu = torch.cuda.is_available() and not os.environ.get('TRITON_INTERPRET')
  # The simulation multiplies float32 exactly; on a GPU the type is that of the race, of 8 bits of mantissa.
  device, dtype, most = ('cuda', torch.bfloat16, 3e-2) if on_gpu else ('cpu', torch.float32, 1e-5)
  wrong = 0
  for config in CONFIGS:
    for shape in ((90, 48, 40, 5, 3), (160, 128, 64, 2, 1)):
      far = check(device, dtype, config, shape=shape)
      wrong += not far < most
      print(f'{dtype} {tuple(config)} {shape}: {far:.1e}')
  return wrong


if __name__ == '__main__':
  sys.exit(main())
