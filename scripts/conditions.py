"""Under what a benchmark ran: goes into the JSON that it writes."""

import os
import pathlib
import platform
import sys

import jax


def conditions() -> dict:
  """The command, and what it ran on."""
  script = pathlib.Path(sys.argv[0]).name
  return {
    'command': ' '.join(['scripts/python', f'scripts/{script}', *sys.argv[1:]]),
    'machine': platform.machine(),
    'cores': len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
    'device': jax.devices()[0].device_kind,
    'python': '.'.join(platform.python_version_tuple()[:2]),
    'jax': jax.__version__,
  }
