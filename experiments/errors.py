"""Errors that end a program with one sentence and their own exit code, so that a launcher knows whether to retry."""


class ExperimentError(Exception):
  """A failure that its sentence explains: key or path, value, and what is accepted."""

  exit_code = 1


class BadInput(ExperimentError, ValueError):
  """A command line or a config that cannot be run; nothing was written."""

  exit_code = 2


class NonFiniteError(ExperimentError):
  """Too many optimizer steps in a row gave a loss or a gradient that is not finite."""

  exit_code = 12


class RunStopped(ExperimentError):
  """A run was asked to end before its last step; the same command goes on from its checkpoint."""

  exit_code = 14


class PeerLost(ExperimentError):
  """Another process of the run cannot be reached; starting all of them again may help."""

  exit_code = 13


class StorageError(ExperimentError):
  """A disk that is full, unwritable or unreadable."""

  exit_code = 15


class DataError(ExperimentError):
  """Corrupt data, or a data stream other than the one a run was started on."""

  exit_code = 16


class RunsFailed(ExperimentError):
  """A sweep came to its end and some of its runs did not."""

  exit_code = 17
