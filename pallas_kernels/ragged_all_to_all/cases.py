"""Tables of rows between four devices that every body must get right."""

import numpy as np

ROWS = 128  # of each device, sent and received

# sizes[s][d] rows go from device s to device d.
CASES = {
  'balanced': np.full((4, 4), 16),
  'uneven': np.array([[1, 17, 0, 40], [16, 15, 33, 2], [0, 0, 0, 5], [30, 31, 32, 9]]),
  'all to one': np.array([[0, 0, 30, 0]] * 4),
  'one sends all': np.array([[16, 40, 1, 30], [0] * 4, [0] * 4, [0] * 4]),
  'nothing': np.zeros((4, 4)),
  'a ring': np.roll(np.diag([128, 127, 113, 1]), 1, axis=1),
}
