"""The C library's allocator, set for training on CPUs.

XLA allocates a step's temporary buffer anew each time. glibc serves a request of that size with fresh pages and returns
them at the end of the step, so the kernel maps and clears all of them again in every step.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform

# malloc.h: parameters of mallopt
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1  # bytes free at the end of the heap before they are returned


def keep_freed_memory() -> bool:
  """Makes what the process frees stay with it, for its next step. Call it before JAX starts its threads.

  A thread has its own, small arena if it may, and large requests of such threads are always mapped: hence one arena.

  Returns:
    Whether anything was set: only with glibc, and only where JAX will run on CPUs.
  """
  if platform.libc_ver()[0] != 'glibc' or _expects_accelerator():
    return False
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
  mallopt = ctypes.CDLL(None).mallopt
  return all(mallopt(parameter, value) for parameter, value in settings)


def _expects_accelerator() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms != 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return bool(plugins) or importlib.util.find_spec('libtpu') is not None
