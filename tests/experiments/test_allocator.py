"""Memory that a step frees stays with the process, in huge pages."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from experiments.allocator import keep_freed_memory

if sys.argv[1] == 'keep':
  assert keep_freed_memory()
x = jnp.ones((4096, 4096))
increment = jax.jit(lambda x: x + 1)
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(60):  # until every hole in the heap is as large as it needs to be
  increment(x).block_until_ready()
before = faults()
for _ in range(5):
  increment(x).block_until_ready()
print(faults() - before)
"""


HUGE = """
import re
from pathlib import Path
from experiments.allocator import keep_freed_memory

assert keep_freed_memory()
maps = re.split(r'\\n(?=[0-9a-f]+-)', Path('/proc/self/smaps').read_text())
(heap,) = (one for one in maps if '[heap]' in one and ' hg' in one)
print(int(re.search(r'Size: +(\\d+) kB', heap)[1]))
"""
LARGE = """
import ctypes, resource
from experiments.allocator import keep_freed_memory

assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 2**31 + 2**28


def step():
  buffer = libc.malloc(size)
  libc.memset(buffer, 1, size)
  libc.free(buffer)


faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
before = faults()
step()
print(faults() - before)
"""
needs_glibc = pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='glibc alone has mallopt'
)


def page_faults(how: str, **environment: str) -> int:
  """Of five sums of 64 MiB each; up to 32 MiB glibc learns by itself."""
  command = [sys.executable, '-c', PROGRAM, how]
  environment = {'PATH': '', 'JAX_PLATFORMS': 'cpu'} | environment
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return int(done.stdout)


@needs_glibc
def test_a_step_takes_the_pages_of_the_step_before():
  assert page_faults('leave') > 5 * 16_000  # pages of 4 KiB
  assert page_faults('keep') < 500


@needs_glibc
def test_more_than_two_gigabytes_stay_too():
  done = subprocess.run([sys.executable, '-c', LARGE], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) < 500


@needs_glibc
@pytest.mark.skipif(
  not Path('/sys/kernel/mm/transparent_hugepage').exists(), reason='a kernel without huge pages'
)
def test_the_heap_asks_for_huge_pages():
  done = subprocess.run([sys.executable, '-c', HUGE], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) > 2**31 / 1024 * 0.99
