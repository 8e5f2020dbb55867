"""The training step: accumulation, meshes and bad steps change what they should and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.place import place_batch
from experiments.state import ModelDef, make_state
from experiments.step import (
  OUTPUTS,
  Control,
  layer_losses,
  make_eval_step,
  make_train_step,
  totals_of,
)
from moejax import MoE
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.exchange import AllGather, single
from moejax.moe.losses import LOSSES
from moejax.transformer import Decoder, ViT
from tests.thorough import and_thorough

B, S, V = 32, 8, 16
ROUTER = {'name': 'group_limited', 'k': 2, 'groups': 2, 'limit': 2, 'weighting': 'sigmoid_norm'}
ALL_LOSSES = dict.fromkeys(LOSSES, 0.5)  # far larger than usual, so that a wrong one shows


def batch(seed=0, rows=B):
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, V, (rows, S + 1)).astype(np.int32)
  lengths = rng.integers(3, S + 1, (rows, 1))
  real = np.arange(S)[None] < lengths  # rows of unlike length: means of means would be wrong
  return {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'segment_ids': real.astype(np.int32),
    'positions': np.broadcast_to(np.arange(S, dtype=np.int32), (rows, S)).copy(),
    'loss_mask': real,
  }


def make(
  mesh=None,
  optimizer=None,
  *,
  microbatches=1,
  bias_rate=0.0,
  losses=ALL_LOSSES,
  dtype=jnp.float32,
  router=ROUTER,
  **controllers,
):
  """State, step and batch placement of a two-layer mixture on one device or on a mesh."""
  exchange = single if mesh is None else AllGather(mesh, BATCH_AXES)
  mesh = mesh or make_mesh(devices=jax.devices()[:1])
  moe = functools.partial(MoE, 8, 12, 4, dict(router), losses={}, exchange=exchange, dtype=dtype)
  definition = ModelDef(
    lambda rngs: Decoder(
      V, 8, 2, 2, 16, moe=lambda rngs: moe(rngs=rngs), moe_layers=(0, 1), dtype=dtype, rngs=rngs
    )
  )
  optimizer = optimizer or optax.sgd(1.0)
  init, _, optimizer = make_state(definition, lambda params: optimizer, mesh)
  step = make_train_step(
    definition,
    optimizer,
    microbatches=microbatches,
    losses=losses,
    bias_rate=bias_rate,
    **controllers,
  )
  control = Control(np.uint32(0), np.ones((), dtype), np.float32(0.0))
  state = init(jax.random.key(0))
  params = jax.tree.map(lambda leaf: leaf.astype(dtype), state.params)
  return (
    dataclasses.replace(state, params=params),
    functools.partial(jax.jit(step), control=control),
    functools.partial(place_batch, mesh),
  )


# In float64, where a wrong term cannot hide in rounding: what is compared differs in the order of additions alone, and
# up to 7e-16 of the largest entry was seen. (In float32 it is 1.5e-5: embeddings start with a deviation of 0.02 and
# are normed at once, which multiplies rounding by 50.)
TOLERANCE = 1e-12
make64 = functools.partial(make, dtype=jnp.float64, bias_rate=0.1)


def check_close(got, want, tolerance=TOLERANCE):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-2)


def like(values, placed):
  """`values` on the devices of `placed`."""
  return jax.tree.map(lambda a, b: jax.device_put(np.asarray(a), b.sharding), values, placed)


@pytest.fixture(scope='module')
def one_step():
  """A plain gradient step on 32 sequences at once, in float64."""
  with jax.enable_x64(True):
    state, step, place = make64()
    return state, *step(state, place(batch()))


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('microbatches', and_thorough([4], [8]))
def test_accumulation_changes_neither_the_loss_nor_any_auxiliary_gradient(one_step, microbatches):
  """1 x 32 = 4 x 8 = 8 x 4: gradients (the parameters after SGD), biases and every metric."""
  before, want, want_metrics = one_step
  state, step, place = make64(microbatches=microbatches)
  got, metrics = step(state, place(batch()))
  check_close(got.params, want.params)
  check_close(got.routing, want.routing, 0)
  check_close(metrics, want_metrics)
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), want.params, before.params)
  assert min(jax.tree.leaves(moved)) > 1e-6


@pytest.mark.usefixtures('x64')
def test_the_mean_of_microbatch_losses_would_be_another_gradient(one_step):
  """The control: four quarters by themselves, averaged, are further off by 1e9 than is accepted above."""
  state, step, place = make64()
  parts = [step(state, place({k: v[m::4] for k, v in batch().items()}))[0].params for m in range(4)]
  mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *parts)
  with pytest.raises(AssertionError):
    check_close(mean, one_step[1].params, 1e9 * TOLERANCE)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('sizes', and_thorough([(2, 1, 4), (1, 2, 2, 2)], [(8, 1, 1)]), ids=str)
def test_a_mesh_changes_nothing(one_step, sizes):
  mesh = make_mesh(*sizes, devices=jax.devices())
  state, step, place = make64(mesh)
  check_close(state.params, one_step[0].params, 1e-6)  # drawn in float32
  state = dataclasses.replace(state, params=like(one_step[0].params, state.params))
  got, metrics = step(state, place(batch()))
  check_close(got.params, one_step[1].params)
  check_close(got.routing, one_step[1].routing, 0)
  check_close(metrics, one_step[2])


def test_the_controller_moves_every_bias_against_its_load(one_step):
  before, after, metrics = one_step
  (bias_le,) = jax.tree.leaves(after.routing)
  assert np.abs(np.asarray(jax.tree.leaves(before.routing)[0])).max() == 0
  load_le = np.asarray(metrics['load'])
  np.testing.assert_allclose(bias_le, 0.1 * np.sign(0.25 - load_le), atol=1e-7)


@pytest.mark.usefixtures('standard_promotion')
def test_a_bad_step_changes_nothing_but_the_counters():
  """A token outside the vocabulary makes the loss NaN: skipped, counted, and the next step is as if it had not been."""
  state, step, place = make(optimizer=optax.adam(1e-2), bias_rate=0.1)
  bad = batch(1)
  bad['tokens'][0, 0] = V + 5
  skipped, metrics = step(state, place(bad))
  assert not np.isfinite(float(metrics['total_loss']))
  for name in ('params', 'routing', 'opt_state'):
    jax.tree.map(np.testing.assert_array_equal, getattr(skipped, name), getattr(state, name))
  assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (1, 1, 1)
  again, _ = step(skipped, place(bad))
  assert (int(again.skipped), int(again.skipped_in_a_row)) == (2, 2)
  good, _ = step(again, place(batch()))
  assert (int(good.step), int(good.skipped), int(good.skipped_in_a_row)) == (3, 2, 0)
  want, _ = step(state, place(batch()))
  jax.tree.map(np.testing.assert_array_equal, good.params, want.params)


@pytest.mark.usefixtures('x64')
def test_losses_add_up_over_layers_with_their_coefficients(one_step):
  _, _, metrics = one_step
  state, step, place = make64(losses={})
  _, plain = step(state, place(batch()))
  assert float(plain['total_loss']) == pytest.approx(float(plain['loss']), rel=TOLERANCE)
  assert float(metrics['loss']) == pytest.approx(float(plain['loss']), rel=TOLERANCE)
  assert float(metrics['total_loss']) > float(metrics['loss']) + 0.5


def test_evaluation_sums_only_what_is_to_be_predicted():
  definition = ModelDef(lambda rngs: Decoder(V, 8, 2, 2, 16, rngs=rngs))
  params, routing = definition.init(jax.random.key(0))
  one = batch(2, rows=4)
  sums = make_eval_step(definition)(params, routing, jax.tree.map(jnp.asarray, one))
  logits, stats = definition.model(params, routing)(
    jnp.asarray(one['tokens']), segment_ids=jnp.asarray(one['segment_ids'])
  )
  assert stats is None
  assert sums.stats is None
  logp = np.asarray(jax.nn.log_softmax(logits))
  picked = np.take_along_axis(logp, one['targets'][..., None], -1)[..., 0]
  assert float(sums.count) == one['loss_mask'].sum()
  assert float(sums.loss) == pytest.approx(-picked[one['loss_mask']].sum(), rel=1e-5)
  right = (logp.argmax(-1) == one['targets'])[one['loss_mask']].sum()
  assert float(sums.correct) == right


def test_every_loss_is_reported_a_layer():
  stats = jax.tree.map(lambda leaf: jnp.ones((3, *leaf.shape)), _stats_of_one())
  losses = layer_losses(stats, ALL_LOSSES)
  assert set(losses) == set(LOSSES)
  assert {value.shape for value in losses.values()} == {(3,)}


def _stats_of_one():
  layer = MoE(8, 12, 4, rngs=nnx.Rngs(0))
  return layer(jnp.ones((1, 2, 8)))[1].stats


def test_experts_move_towards_each_other_and_two_passes_towards_agreement():
  """THOR's loss and averaged weights in one step; with a learning rate of 0 nothing else moves."""
  state, step, place = make(losses={}, router={'name': 'thor'}, average_rate=0.4, consistency=3.0)
  still = Control(np.uint32(0), np.float32(0), np.float32(0.5))
  new, metrics = step(state, place(batch()), control=still)
  want = metrics['loss'] + 1.5 * metrics['divergence']
  np.testing.assert_allclose(metrics['total_loss'], want, rtol=1e-6)
  assert float(metrics['divergence']) > 0
  for (path, old), moved in zip(
    jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(new.params), strict=True
  ):
    if 'experts' in jax.tree_util.keystr(path):
      others = (old.sum(1, keepdims=True) - old) / 3
      np.testing.assert_allclose(moved, 0.8 * old + 0.2 * others, atol=1e-6)
    else:
      np.testing.assert_array_equal(moved, old)


def test_sigmoid_outputs_have_the_binary_cross_entropy_of_every_class(rng):
  """Images with one, two and no labels of four classes, by the definition; a row that is not valid counts nothing."""
  logits = rng.normal(size=(4, 4)).astype(np.float32) * 3
  labels = np.array([[2, -1], [0, 3], [-1, -1], [1, -1]], np.int32)
  found = [{label for label in row if label >= 0} for row in labels.tolist()]
  losses = []
  for row, own in zip(logits.astype(np.float64), found, strict=True):
    p = 1 / (1 + np.exp(-row))
    losses.append(-sum(np.log(p[o]) if o in own else np.log(1 - p[o]) for o in range(4)))
  right = [row.argmax() in own for row, own in zip(logits, found, strict=True)]
  valid = np.array([True, True, True, False])
  images = {'image': None, 'label': jnp.asarray(labels), 'valid': jnp.asarray(valid)}
  sums = totals_of(jnp.asarray(logits), None, images, 'sigmoid')
  np.testing.assert_allclose(sums.loss, sum(losses[:3]), rtol=1e-5)
  assert (int(sums.correct), int(sums.count)) == (sum(right[:3]), 3)


def test_one_label_is_a_list_of_one(rng):
  logits = jnp.asarray(rng.normal(size=(5, 3)).astype(np.float32))
  labels = jnp.asarray([0, 2, 1, 1, 0], jnp.int32)
  for one, several in zip(
    OUTPUTS['sigmoid'](logits, labels), OUTPUTS['sigmoid'](logits, labels[:, None]), strict=True
  ):
    np.testing.assert_array_equal(one, several)


FULL = {
  'batch priority': {'name': 'vmoe', 'capacity_factor': 0.5, 'priority': 'score'},
  'first choices first': {'name': 'vmoe', 'capacity_factor': 0.5},
  'experts choose': {'name': 'expert_choice', 'capacity_factor': 1.0, 'group': 'batch'},
  'no capacity': {'name': 'top_k'},
  'slots': {'name': 'soft'},
  'slots across images': {'name': 'mixture_of_tokens', 'group_size': 2},
}
USUAL = ('batch priority', 'experts choose', 'slots across images')


@pytest.mark.parametrize('case', and_thorough(USUAL, [case for case in FULL if case not in USUAL]))
def test_images_that_fill_the_last_batch_take_no_place_and_are_not_counted(case):
  """Two images and two that fill the batch, against the two alone with as many places of an expert."""
  router = FULL[case]

  def evaluate(images, **places):
    make_moe = functools.partial(MoE, 8, 12, 4, router | places)
    sizes = ((4, 8, 1), 2, 3, 8, 2, 2, 8)  # eight patches an image
    definition = ModelDef(
      lambda rngs: ViT(*sizes, moe=lambda rngs: make_moe(rngs=rngs), moe_layers=(0, 1), rngs=rngs)
    )
    params, routing = definition.init(jax.random.key(0))
    params['head']['weight'] = jax.random.normal(jax.random.key(1), (8, 3))
    return jax.jit(make_eval_step(definition))(params, routing, images)

  rng = np.random.default_rng(3)
  alone = {
    'image': jnp.asarray(rng.normal(size=(2, 4, 8, 1)).astype(np.float32)),
    'label': jnp.array([0, 2], jnp.int32),
    'valid': jnp.ones(2, bool),
  }
  filled = {key: jnp.concatenate([value, value[1:], value[1:]]) for key, value in alone.items()}
  filled['valid'] = jnp.array([True, True, False, False])
  factor = router.get('capacity_factor')
  want = evaluate(alone, **({'capacity_factor': 2 * factor} if factor else {}))
  got = evaluate(filled)
  assert float(got.count) == 2
  assert float(got.stats.tokens[0]) == 16
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
