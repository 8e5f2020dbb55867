"""Our side of the training benchmark still fits the training step that it times."""

import numpy as np
import pytest

from scripts import bench_decoder


@pytest.mark.usefixtures('standard_promotion')
def test_the_decoder_of_the_benchmark_learns_a_repeated_batch(monkeypatch):
  for name, value in dict(LENGTH=16, LAYERS=1, WIDTH=32, HIDDEN=32, HEADS=2).items():
    monkeypatch.setattr(bench_decoder, name, value)
  tokens = np.random.default_rng(0).integers(256, size=(2, 16), dtype=np.int32)
  ours = bench_decoder.Ours(tokens)
  first, last = ours.train(1), ours.train(20)
  assert last < first - 0.5
