"""The figures of studies, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.studies.rows import mean_sd


def pyplot() -> Any:
  """matplotlib, drawing to files; slow to import, so not before it is needed."""
  import matplotlib as mpl

  mpl.use('Agg')
  from matplotlib import pyplot as plt

  plt.rcParams.update(
    {
      'axes.spines.top': False,
      'axes.spines.right': False,
      'axes.grid': True,
      'grid.color': '#e4e4e4',
      'axes.axisbelow': True,
      'figure.dpi': 130,
      'font.size': 9,
      'legend.frameon': False,
    }
  )
  return plt


def bars(
  file: Path,
  values: Mapping[str, Sequence[float]],
  unit: str,
  title: str,
  means: Sequence[tuple[float, float]] | None = None,
) -> None:
  """A dot with its standard deviation for every name, one below the other, and the seeds as small dots.

  Args:
    file: to write.
    values: name -> what the seeds gave.
    unit: what is said at the axis.
    title: above it.
    means: mean and standard deviation of each, where not all seeds are known.
  """
  means = means or [mean_sd(seeds) for seeds in values.values()]
  plt = pyplot()
  figure, axis = plt.subplots(figsize=(7, 0.6 + 0.27 * len(values)), layout='constrained')
  for place, (seeds, (mean, sd)) in enumerate(zip(values.values(), means, strict=True)):
    axis.plot(seeds, [place] * len(seeds), '.', color='#9db8d9', zorder=2)
    axis.errorbar(mean, place, xerr=sd, fmt='o', color='#1f5fa8', markersize=5, capsize=2, zorder=3)
  axis.set_yticks(np.arange(len(values)), list(values))
  axis.invert_yaxis()
  axis.set_xlabel(unit)
  axis.set_title(title, loc='left', fontsize=10)
  figure.savefig(file)
  plt.close(figure)
