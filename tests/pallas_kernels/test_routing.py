"""Every body of the routing metadata against stable sorts, and against loops in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported, lay_out, pack, top_k
from pallas_kernels.routing import blocks, cpu
from pallas_kernels.routing.cases import PACK_CASES, TOP_K_CASES
from tests.pallas_kernels.interpreted import interpreted

BODIES = ('blocks', 'cpu', 'tpu')
NAN_CASE = TOP_K_CASES[-1]
# Cases of one shape share one compiled program.
packed = jax.jit(pack, static_argnums=1, static_argnames='implementation')
laid_out = jax.jit(lay_out, static_argnums=(1, 2))
best = jax.jit(top_k, static_argnums=1, static_argnames='implementation')


@pytest.mark.parametrize('implementation', BODIES)
@pytest.mark.parametrize('case', PACK_CASES, ids=lambda case: case.name)
def test_rows_are_packed_stably(case, implementation):
  expert, experts = np.minimum(case.expert, case.num_experts), case.num_experts
  with interpreted(implementation):
    found = packed(jnp.asarray(case.expert, jnp.int32), experts, implementation=implementation)
  order = np.argsort(expert, kind='stable')
  np.testing.assert_array_equal(found.order, order)
  np.testing.assert_array_equal(np.asarray(found.position)[order], np.arange(len(expert)))
  np.testing.assert_array_equal(
    found.starts, np.searchsorted(np.sort(expert), np.arange(experts + 1))
  )
  wanted = packed(jnp.asarray(case.expert, jnp.int32), experts, implementation='reference')
  for name in found._fields:
    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert getattr(found, name).dtype == jnp.int32


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('implementation', ('blocks', 'cpu'))
def test_positions_are_int32_where_float64_is_allowed(implementation):
  found = pack(jnp.asarray([2, 0, 3, 2], jnp.int32), 3, implementation=implementation)
  assert [x.tolist() for x in found] == [[1, 0, 3, 2], [1, 0, 3, 2], [0, 1, 1, 3]]
  assert {x.dtype for x in found} == {jnp.dtype('int32')}


def test_on_a_cpu_few_experts_are_counted_and_many_sorted():
  row = jnp.zeros(64, jnp.int32)
  text = lambda experts: str(jax.make_jaxpr(functools.partial(cpu.pack, num_experts=experts))(row))
  assert ' sort[' not in text(128) and ' sort[' in text(129)


def test_keys_that_do_not_fit_are_sorted_one_after_the_other():
  rows = np.arange(4096, dtype=np.int32)[::-1] % 7 * 70_000
  order, _, _ = blocks.pack(jnp.asarray(rows), num_experts=600_000)
  np.testing.assert_array_equal(order, np.argsort(rows, kind='stable'))


@pytest.mark.parametrize('tile', (1, 8, 128))
@pytest.mark.parametrize('case', PACK_CASES, ids=lambda case: case.name)
def test_each_tile_belongs_to_one_expert(case, tile):
  """A loop that hands out places one row after the other gives the same layout."""
  layout = laid_out(jnp.asarray(case.expert, jnp.int32), case.num_experts, tile)
  layout = jax.tree.map(np.asarray, layout)
  sizes = [case.expert.count(e) for e in range(case.num_experts)]
  starts = np.cumsum([0, *(-(-size // tile) * tile for size in sizes)])
  np.testing.assert_array_equal(layout.sizes, sizes)
  np.testing.assert_array_equal(layout.starts, starts)
  next_place, row = starts.copy(), np.full(layout.row.shape, -1)
  for r, expert in enumerate(case.expert):
    if expert < case.num_experts:
      assert layout.place[r] == next_place[expert]
      row[next_place[expert]] = r
      next_place[expert] += 1
    else:
      assert layout.place[r] == layout.row.shape[0]
  np.testing.assert_array_equal(layout.row, row)
  owner = [np.searchsorted(starts[1:], tile * i, side='right') for i in range(len(layout.expert))]
  np.testing.assert_array_equal(layout.expert, owner)


@pytest.mark.parametrize('implementation', BODIES)
@pytest.mark.parametrize('case', TOP_K_CASES, ids=lambda case: case.name)
def test_top_k_equals_the_sort(case, implementation):
  logits = jnp.asarray(case.logits)
  wanted_prob, wanted = best(logits, case.k, implementation='reference')
  with interpreted(implementation):
    prob, expert = best(logits, case.k, implementation=implementation)
  np.testing.assert_array_equal(expert, wanted)
  np.testing.assert_allclose(prob, wanted_prob, rtol=1e-6)
  assert prob.dtype == jnp.float32 and expert.dtype == jnp.int32


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_a_nan_is_chosen_first_and_is_seen_in_its_token_only(implementation):
  with interpreted(implementation):
    prob, expert = map(
      np.asarray, top_k(jnp.asarray(NAN_CASE.logits), 3, implementation=implementation)
    )
  assert (
    expert[3, 0] == 5 and expert[4, :2].tolist() == [2, 11] and expert[6, :2].tolist() == [12, 7]
  )
  assert np.isnan(prob[2:7]).all() and np.isfinite(np.delete(prob, slice(2, 7), axis=0)).all()
  assert expert[1, :2].tolist() == sorted(expert[1, :2], key=lambda e: -NAN_CASE.logits[1, e])
  assert prob[1, 2] == 0 and expert[1, 2] == 0 and expert[2].tolist() == [0, 1, 2]


@pytest.mark.parametrize('implementation', BODIES)
def test_the_gradient_flows_through_the_whole_softmax(implementation):
  """Against a difference quotient in float64."""
  logits, cotangent = (np.random.default_rng(s).normal(size=(6, 8)) for s in (0, 1))

  def by_hand(logits):
    prob = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.sum(-np.sort(-prob, axis=1)[:, :3] * cotangent[:, :3])

  @jax.jit
  def loss(logits):
    return jnp.sum(
      top_k(logits, 3, implementation=implementation)[0] * cotangent[:, :3].astype('f')
    )

  with interpreted(implementation):
    found = jax.grad(loss)(jnp.asarray(logits, jnp.float32))
  step = 1e-6 * np.eye(48).reshape(48, 6, 8)
  wanted = [(by_hand(logits + s) - by_hand(logits - s)) / 2e-6 for s in step]
  np.testing.assert_allclose(found, np.reshape(wanted, (6, 8)), atol=1e-6)


def test_bfloat16_logits_give_float32_probabilities():
  logits = jnp.asarray(TOP_K_CASES[0].logits, jnp.bfloat16)
  prob, _ = top_k(logits, 2)
  wanted, _ = top_k(logits.astype(jnp.float32), 2)
  np.testing.assert_array_equal(prob, wanted)


def test_rows_of_each_device_are_packed_by_themselves(make_mesh):
  mesh = make_mesh(data=4)
  expert = jnp.asarray(PACK_CASES[1].expert, jnp.int32)
  local = lambda e: pack(e, 4)[:2]
  specs = dict(mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  order, _ = jax.jit(jax.shard_map(local, **specs))(expert)
  wanted = [np.argsort(part, kind='stable') for part in np.split(np.asarray(expert), 4)]
  np.testing.assert_array_equal(order, np.concatenate(wanted))


def test_bad_arguments_are_refused():
  logits, expert = jnp.ones((4, 3)), jnp.zeros(4, jnp.int32)
  with pytest.raises(ValueError, match='k=4: accepted are 1 to 3'):
    top_k(logits, 4)
  with pytest.raises(ValueError, match='tile=0: at least 1 row'):
    lay_out(expert, 3, 0)
  with pytest.raises(ValueError, match="implementation='cuda' of pack"):
    pack(expert, 3, implementation='cuda')
  with pytest.raises(Unsupported, match='logits is float8_e4m3fn'):
    top_k(logits.astype(jnp.float8_e4m3fn), 2)
  with pytest.raises(Unsupported, match=r'top_k on TPU: logits are float32 \(4, 2000\)'):
    jax.eval_shape(lambda: top_k(jnp.ones((4, 2000)), 2, implementation='tpu'))
