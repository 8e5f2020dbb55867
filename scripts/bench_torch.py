"""torch's grouped matmul as a contestant of bench_kernels.py, where torch has CUDA."""

import functools

import numpy as np
import torch


class Done:
  """A call that has been queued; `block_until_ready` waits for the device."""

  def __init__(self, function):
    self.result = function()

  @property
  def nbytes(self) -> int:
    """Bytes of the result."""
    return self.result.nbytes

  def block_until_ready(self):
    """Waits until everything queued so far is done."""
    torch.cuda.synchronize()
    return self


def contestants(arguments) -> dict:
  """`{'torch': {'forward', 'both'}}` on random numbers of the same shapes and groups; empty without CUDA."""
  if not torch.cuda.is_available() or not hasattr(torch, '_grouped_mm'):
    return {}
  lhs, rhs, sizes = arguments
  ends = torch.tensor(np.cumsum(np.asarray(sizes)), dtype=torch.int32, device='cuda')
  random = lambda shape: torch.randn(shape, device='cuda', dtype=torch.bfloat16)
  a, w = random(lhs.shape).requires_grad_(), (random(rhs.shape) * 0.02).requires_grad_()
  out_gradient = random((lhs.shape[0], rhs.shape[2]))

  def forward():
    with torch.no_grad():
      return torch._grouped_mm(a, w, offs=ends)

  def both():
    return torch.autograd.grad(torch._grouped_mm(a, w, offs=ends), (a, w), out_gradient)

  return {
    'torch': {'forward': functools.partial(Done, forward), 'both': functools.partial(Done, both)}
  }
