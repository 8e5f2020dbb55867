"""From all experts to one: temperatures, thresholds and the switch (EvoMoE)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Context
from moejax.routers.dense_to_sparse import DenseToSparse
from tests.routers.table import H, kept, make, tokens


def dts(**options):
  defaults = dict(
    tau_max=2.0,
    tau_min=0.2,
    decay='linear',
    switch_at=1.0,
    threshold=0.001,
    tempered=True,
    gumbel=False,
  )
  return DenseToSparse(**(defaults | options))


def at(progress):
  return Context(train=True, progress=jnp.float32(progress), rng=jax.random.key(0))


def test_tempered_weights_and_the_threshold():
  """Logits (2, 1, 0, -1): at tau 0.2 two experts are above 0.001, at tau 2 all four."""
  logits, gate = H[None, :1], dts()
  early = gate(logits, None, None, at(0.0))
  np.testing.assert_allclose(early.gate[0, 0], [0.455054, 0.276004, 0.167405, 0.101536], atol=1e-6)
  assert kept(gate.assign(early, at(0.0))).tolist() == [4]
  gate = dts(tau_max=0.2)
  late = gate(logits, None, None, at(0.5))
  np.testing.assert_allclose(late.gate[0, 0], [0.993262, 0.006693, 0.000045, 0.0], atol=2e-6)
  assert kept(gate.assign(late, at(0.5))).tolist() == [2]


@pytest.mark.parametrize('decay', ['linear', 'exponential'])
def test_the_temperature_falls_and_the_experts_with_it(decay):
  gate = dts(decay=decay, threshold=0.05, switch_at=0.8)
  assert float(gate.temperature(jnp.float32(0.4))) == pytest.approx(
    {'linear': 1.1, 'exponential': (2.0 * 0.2) ** 0.5}[decay], rel=1e-5
  )
  counts = []
  for progress in np.linspace(0, 1, 11):
    context = at(progress)
    counts.append(kept(gate.assign(gate(H[None], None, None, context), context)).mean())
  assert counts[0] > 3
  assert all(a >= b for a, b in itertools.pairwise(counts))
  assert counts[7] > 1
  assert counts[8:] == [1, 1, 1]


@pytest.mark.parametrize('context', [at(1.0), Context()], ids=['switched', 'evaluation'])
def test_after_the_switch_it_is_switch(context):
  """Also with noise on: the last phase has none."""
  router = make('dense_to_sparse', tau_min=0.2, switch_at=0.9)
  plain = make('top_k', k=1)
  plan, want = router(tokens(), context), plain(tokens(), context)
  first = plan.weight.reshape(12, -1)
  np.testing.assert_array_equal(plan.expert.reshape(12, -1)[:, 0], want.expert)
  np.testing.assert_allclose(first[:, 0], want.weight, rtol=1e-6)
  assert float(first[:, 1:].sum()) == 0


def test_hot_gates_are_uniform():
  gate = dts(tau_max=1e4, tau_min=1e4)
  np.testing.assert_allclose(gate(H[None], None, None, at(0.0)).gate, 0.25, atol=1e-3)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'tau_min': 3.0}, 'tau_min=3.0, tau_max=2.0: accepted are'),
    ({'decay': 'cosine'}, "decay='cosine': accepted are 'linear'"),
    ({'switch_at': 2.0}, 'switch_at=2.0: accepted are numbers from 0 to 1'),
  ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    make('dense_to_sparse', **options)


def test_noise_needs_a_key():
  context = Context(train=True, progress=jnp.float32(0.5))
  with pytest.raises(ValueError, match='gumbel=True needs context.rng in training'):
    make('dense_to_sparse')(tokens(), context)
