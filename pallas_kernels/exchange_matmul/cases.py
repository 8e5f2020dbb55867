"""Rows between four devices with three experts each, that every body must get right."""

import numpy as np

DEVICES, EXPERTS = 4, 3
ROWS = 256  # of each device, sent and received


def _random(seed, rows, skew):
  """Every device chooses experts for `rows` rows; the first ones more often the larger `skew` is."""
  rng = np.random.default_rng(seed)
  weight = np.arange(1, 13) ** -skew
  chosen = [rng.multinomial(rows, weight / weight.sum()) for _ in range(DEVICES)]
  return np.stack(chosen).reshape(DEVICES, DEVICES, EXPERTS)


def _of(entries):
  sizes = np.zeros((DEVICES, DEVICES, EXPERTS), np.int64)
  for place, rows in entries.items():
    sizes[place] = rows
  return sizes


# sizes[s, d, e] rows go from device s to expert e of device d.
CASES = {
  'balanced': np.full((DEVICES, DEVICES, EXPERTS), 16),
  'around the width of a copy': np.resize([0, 1, 15, 16, 17], (DEVICES, DEVICES, EXPERTS)),
  'one row': _of({(1, 2, 1): 1}),
  'nothing': _of({}),
  'all to one expert': _of({(s, 2, 1): 64 for s in range(DEVICES)}),
  'all to the last expert of one device': _of({(s, 0, 2): 47 for s in range(DEVICES)}),
  'one device sends nothing': _random(0, 30, 0.0) * np.array([1, 0, 1, 1])[:, None, None],
  'one device sends all': _of({(3, d, e): 9 for d in range(DEVICES) for e in range(EXPERTS)}),
  'an expert is empty': _random(1, 40, 0.0) * np.array([1, 0, 1]),
  'the first expert is empty': _random(2, 40, 0.0) * np.array([0, 1, 1]),
  'skewed': _random(3, 60, 1.0),
  'to itself': _of({(d, d, e): 30 + d + e for d in range(DEVICES) for e in range(EXPERTS)}),
}
