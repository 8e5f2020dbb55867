"""What is known of a sweep's runs before they start: that the library accepts them, and how much work they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from experiments.build import open_stream, program_key
from experiments.check_routing import check_routing
from experiments.data import Stream
from experiments.errors import BadInput
from experiments.flops import training_flops
from experiments.sweeps.plan import Run


class Costs:
  """FLOPs and shapes of runs.

  Making one prepares the data of all runs, once, before any worker would.

  Raises:
    BadInput: a run that the data or the library refuse; the sentence names the run.
  """

  def __init__(self, runs: Iterable[Run]):
    streams: dict[object, Stream] = {}
    checked: set[str] = set()
    self._flops: dict[str, float] = {}
    self._shapes: dict[str, str] = {}
    for run in runs:
      settings = run.settings
      data = dataclasses.astuple(settings.data)
      try:
        if data not in streams:
          streams[data] = open_stream(settings, train=True)
        stream = streams[data]
        shape = program_key(settings, stream)
        if shape not in checked:
          check_routing(settings)
          checked.add(shape)
      except BadInput as error:
        raise BadInput(f'{run.name}: {error}') from error
      self._shapes[run.key] = shape
      self._flops[run.key] = settings.steps * training_flops(settings, stream)

  def flops(self, run: Run) -> float:
    """Model FLOPs of the whole training."""
    return self._flops[run.key]

  def shape(self, run: Run) -> str:
    """Equal for runs that share a compiled program."""
    return self._shapes[run.key]
