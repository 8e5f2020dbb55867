"""Refusing to continue a run on another data stream than the one it was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.data.errors import DataMismatch


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
  """Raises DataMismatch that names the first field (by name) in which the two differ."""
  for field in sorted({*saved, *current}):
    before, now = (side.get(field, 'absent') for side in (saved, current))
    if before != now:
      raise DataMismatch(
        f'the data stream changed: {field}={now!r} and the checkpoint has {before!r}; '
        'restore that value, or accept another stream with --config.data.allow_changed_stream=true'
      )
