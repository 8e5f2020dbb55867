"""The definition of `quantised_matmul`: the weights are written out, then as grouped_matmul."""

from ..grouped_matmul.reference import grouped_matmul
from ..registry import accumulator


def quantised_matmul(lhs, values, scale, group_sizes):
  """See the contract in `__init__`."""
  acc = accumulator(lhs)
  matrices = values.astype(acc) * scale.astype(acc)
  out = grouped_matmul(lhs.astype(acc), matrices, group_sizes, transpose_rhs=False)
  return out.astype(lhs.dtype)
