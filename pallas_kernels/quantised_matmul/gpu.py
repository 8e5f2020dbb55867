"""`quantised_matmul` for NVIDIA Hopper: eight bits travel to the registers, where they are widened."""

import jax

from ..hopper import narrow, tiles
from ..hopper.layout import collect, lay_out, spread


def forward(lhs_rd, values, scale, starts, *, gather=True):
  """Same values as cpu.forward.

  `gather`: the kernel fetches the rows itself, instead of reading a padded copy of lhs that XLA makes.

  Raises:
    Unsupported: rows of other types than bfloat16 and float16, widths that are no multiples of 128.
  """
  num_rows, (num_experts, inner, width) = lhs_rd.shape[0], values.shape
  tiles.check_types('quantised_matmul', lhs_rd)
  tiles.check_widths('quantised_matmul', **{'values.shape[1]': inner, 'values.shape[2]': width})
  layout = lay_out(starts, num_rows, narrow.rows_per_tile(num_rows, num_experts))
  lhs = lhs_rd if gather else spread(lhs_rd, layout.row)
  kind = values.dtype.name
  bits = values if kind == 'int8' else jax.lax.bitcast_convert_type(values, 'int8')
  options = dict(gathered=gather)
  out_pf = narrow.run('quantised_matmul', lhs, bits, scale[:, 0], kind, layout, **options)
  return collect(out_pf, layout, starts[-1])
