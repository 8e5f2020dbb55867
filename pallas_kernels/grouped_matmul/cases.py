"""Group sizes that every body of `grouped_matmul` must get right; cases of one shape share one program."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
  """`num_rows` rows of which the first `sum(sizes)` are in groups; the others hold NaN."""

  name: str
  num_rows: int
  sizes: tuple[int, ...]

  def arrays(self, dtype, d_in: int = 8, d_out: int = 12) -> dict[str, np.ndarray]:
    """Inputs by name, the rows past the last group NaN."""
    rng = np.random.default_rng(0)
    lhs = rng.normal(size=(self.num_rows, d_in))
    lhs[sum(self.sizes) :] = np.nan
    return {
      'lhs': lhs.astype(dtype),
      'rhs': rng.normal(size=(len(self.sizes), d_in, d_out), scale=d_in**-0.5).astype(dtype),
      'group_sizes': np.array(self.sizes, np.int32),
    }


CASES = (
  Case('balanced', 512, (128, 128, 128, 128)),
  Case('uneven with a tail', 512, (200, 3, 150, 59)),
  Case('empty experts at both ends', 512, (0, 300, 212, 0)),
  Case('one hot expert', 512, (0, 0, 512, 0)),
  Case('around the block width', 512, (1, 127, 128, 129)),
  Case('tail only', 512, (0, 0, 0, 0)),
  Case('one expert', 64, (50,)),
  Case('fewer rows than experts', 4, (1, 0, 0, 0, 0, 0, 2, 1)),
  Case('a tile and a row', 129, (0, 129)),
  Case('one row', 1, (0, 1)),
  Case('no rows', 0, (0, 0)),
)
