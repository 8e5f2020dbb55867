"""The C library's allocator, set for training on CPUs.

XLA allocates a step's temporary buffer anew each time. glibc serves a request of that size with fresh pages and returns
them at the end of the step, so the kernel maps and clears all of them again in every step. And it serves them with
small pages, of which a processor knows the places of a few megabytes.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

# malloc.h: parameters of mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_MOST = 2**31 - 1  # bytes reserved as the heap grows
# Freed bytes are never returned: a step's buffer may be larger than any number that fits.
_NEVER = -1
_HUGE_PAGES = 14  # mman.h: an advice of madvise
_ONE_MORE = 2**22  # bytes that do not fit a heap that has hardly been used


def keep_freed_memory() -> bool:
  """Makes what the process frees stay with it, for its next step. Call it before JAX starts its threads.

  A thread has its own, small arena if it may, and large requests of such threads are always mapped: hence one arena.

  Returns:
    Whether anything was set: only with glibc, and only where JAX will run on CPUs.
  """
  if platform.libc_ver()[0] != 'glibc' or _expects_accelerator():
    return False
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _MOST))
  libc = ctypes.CDLL(None)
  done = all(libc.mallopt(parameter, value) for parameter, value in settings)
  return done and _advise_huge_pages(libc)


def _advise_huge_pages(libc: ctypes.CDLL) -> bool:
  """Reserves the next two gigabytes of the heap, addresses without memory, and asks for huge pages there."""
  libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  libc.free(libc.malloc(_ONE_MORE))  # the heap grows
  maps = Path('/proc/self/maps').read_text(encoding='utf-8').splitlines()
  ranges = [line.split()[0].split('-') for line in maps if line.endswith('[heap]')]
  for first, end in ranges:
    start = int(first, 16)
    libc.madvise(start, int(end, 16) - start, _HUGE_PAGES)  # a kernel without them refuses: no loss
  return bool(ranges)


def _expects_accelerator() -> bool:
  platforms = os.environ.get('JAX_PLATFORMS')
  if platforms:
    return platforms != 'cpu'
  plugins = importlib.metadata.entry_points(group='jax_plugins')
  return bool(plugins) or importlib.util.find_spec('libtpu') is not None
