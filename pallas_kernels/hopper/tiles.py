"""Which tiles a kernel takes: a committed table, so that the same shapes give the same program everywhere.

Rows per tile follow the mean rows per group: 128 (a warpgroup for each half) where groups fill them, 64 (a
warpgroup for each half of the columns) for small groups. 64 x 256 x 16 is the widest wgmma; four or more stages of a
contracted depth of 64 hide the latency of loads. The entries come from the shared memory and the registers that they
leave (tests/pallas_kernels/aot); none has been timed.
"""

from typing import NamedTuple

from ..registry import Unsupported

MULTIPLE = 128  # what every width of a matrix must be a multiple of
WIDE = 96  # mean rows per group from which tiles of 128 rows waste less than they gain


class Tiles(NamedTuple):
  """Rows and columns of an output tile, and stages of the ring.

  `halves` says what the two warpgroups share out: 'rows' or 'columns'.
  """

  rows: int
  columns: int
  stages: int

  @property
  def halves(self) -> str:
    return 'rows' if self.rows == 128 else 'columns'

  @property
  def part(self) -> tuple[int, int]:
    """Rows and columns of one warpgroup."""
    return (64, self.columns) if self.rows == 128 else (self.rows, self.columns // 2)


def rows_per_tile(num_rows: int, num_experts: int) -> int:
  """128 or 64 rows."""
  return 128 if num_rows >= WIDE * num_experts else 64


def columns_of(width: int) -> int:
  """Columns of an output tile over a matrix of that width."""
  return 256 if width % 256 == 0 else 128


def check_widths(operation: str, *, body: str = 'gpu', **widths: int) -> None:
  """Refuses what no tile divides.

  Raises:
    Unsupported: a width is not a multiple of 128.
  """
  for name, width in widths.items():
    if width % MULTIPLE or not width:
      raise Unsupported(
        f'{operation}: implementation={body!r} wants multiples of {MULTIPLE}, {name}={width}'
      )


def choose(rows: int, width: int, *, sides: int = 1, epilogue_buffers: int = 0) -> Tiles:
  """The tile over products of `width` columns, those of `sides` matrices of equal width together.

  `epilogue_buffers`: tiles of a 16-bit type that the epilogue keeps in shared memory beside the ring; they leave
  room and registers for 128 columns.
  """
  narrow = epilogue_buffers or width // sides % 128 or width % 256
  return Tiles(rows, 128 if narrow else 256, 4)


def check_types(operation: str, rows, *, body: str = 'gpu', **weights) -> None:
  """Refuses what the tensor cores do not multiply at full speed: of float32 they would read 10 bits of mantissa.

  Raises:
    Unsupported: `rows` are not bfloat16 or float16, or weights neither of their type nor float32.
  """
  if str(rows.dtype) not in ('bfloat16', 'float16'):
    raise Unsupported(
      f'{operation}: implementation={body!r} multiplies rows of bfloat16 or float16, not {rows.dtype}'
    )
  for name, weight in weights.items():
    if str(weight.dtype) not in ('float32', str(rows.dtype)):
      raise Unsupported(
        f'{operation}: implementation={body!r} with rows of {rows.dtype} wants {name} of that type or '
        f'float32, not {weight.dtype}'
      )
