"""The two errors that belong to data alone; the others are those of experiments.errors."""

from __future__ import annotations

from experiments.errors import DataError


class InvalidRecord(ValueError):
  """One record that cannot be used; the message says why. Skipped and counted by the index."""


class DataMismatch(DataError, ValueError):
  """The stream at hand is not the stream that a checkpoint was trained on."""
