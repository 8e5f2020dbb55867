"""Every router x every exchange x meshes of eight simulated devices: value and gradient are the single device's.

An exchange sees of a router only its rows (or slots), so one program for each exchange and mesh serves all routers:
rows are padded to a common shape, routers of one kind share it. In float64, and against one device. A second test runs
whole layers, router and losses included, each router on one exchange and mesh; with --full-matrix on all of them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Assignment, Context, MoE, SoftPlan, make_router, router_names
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.moe.dispatch import einsum, fused
from moejax.moe.exchange import EXCHANGES, make_exchange, single
from moejax.moe.experts import Experts
from moejax.moe.zero_computation import rows_of_bank
from tests import router_table as table
from tests.thorough import and_thorough, unless

B, S, D, E, F, V = 8, 6, 8, 8, 4, 16
T = B * S
SKEWS = {'even': 0.0, 'skewed': 3.0}  # of all inputs: every token is then drawn to the same experts

ROWS = {}
for _row, _options in table.ROWS.items():  # one of each name, and those whose rows lie otherwise
  if _options['name'] not in {one['name'] for one in ROWS.values()} or _row in (
    'batch_prioritised',
    'expert_choice_batch',
    'expert_choice_position_pairs',
  ):
    ROWS[_row] = _options

# Options under which nothing is lost. Of the fallback's buffer half of the rows find no place.
CASES = {
  'local': ('local', {}),
  'all_gather': ('all_gather', {}),
  'all_to_all': ('all_to_all', {'capacity_factor': 0}),
  'all_to_all_chunks': ('all_to_all', {'capacity_factor': 0, 'chunks': 2}),
  'bilevel': ('bilevel', {'capacity_factor': 0, 'nodes': 2}),
  'ragged_all_to_all': ('ragged_all_to_all', {}),
  'ragged_in_one_kernel': ('ragged_all_to_all', {'kernel': 'reference'}),
  'ragged_fallback': ('ragged_fallback', {'buffer_factor': 0.5}),
  'sparse_fsdp': ('sparse_fsdp', {'capacity_factor': 0, 'hot': 1}),
}
MESHES = {  # data, fsdp, expert, tensor
  '2x2x2': (2, 2, 2, 1),
  '8': (1, 1, 8, 1),
  'tensor': (1, 2, 2, 2),
  '1': (1, 1, 1, 1),
  '4x2': (4, 1, 2, 1),
}
USUAL, MORE = tuple(MESHES)[:3], tuple(MESHES)[3:]
"""Meshes of the default suite and of the thorough tests."""
LAYERS = set(table.USUAL) - set(table.SCORERS) | {'m3vit', 'rmoe', 'spatial'}
"""Rows whose layers are in the default suite: of routers that are others with logits of their own, three."""
KINDS = {'tokens': T, 'sequences': B, 'pairs': B // 2, 'batch': 1, 'slots': 0}  # their groups
KIND_OF = {  # of rows that are not those of one token after another
  'expert_choice': 'sequences',
  'expert_choice_batch': 'batch',
  'expert_choice_position_pairs': 'pairs',
  'mixture_of_tokens': 'slots',
  'sinkhorn_expert_choice': 'sequences',
  'soft': 'slots',
  'sparse_expert_choice': 'sequences',
}


def refusal(case, mesh, groups) -> str | None:
  """Why a combination cannot work, as the error says it; None: it works."""
  shards, owners = int(np.prod(MESHES[mesh][:3])), MESHES[mesh][2]
  if case == 'bilevel' and owners % 2:
    return f'nodes=2 does not divide mesh axis expert={owners}'
  if case == 'ragged_in_one_kernel' and MESHES[mesh][3] > 1:
    return "kernel='reference' with mesh axis tensor=2: accepted is 1"
  if case == 'local' and groups and groups % shards:
    return "exchange='local' with routing groups that span"
  if case == 'all_to_all_chunks' and groups and groups != T:
    return 'chunks=2: accepted are .* 1 for routers whose experts choose'
  return None


def mesh_of(mesh):
  sizes = MESHES[mesh]
  return make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def exchange_of(case, mesh):
  name, options = CASES[case]
  return make_exchange(name, mesh_of(mesh), BATCH_AXES, options)


def tokens(skew=0.0):
  x = jax.random.normal(jax.random.key(2), (B, S, D), jnp.float32)
  return x + jnp.asarray(skew, x.dtype)


def context() -> Context:
  """Training, with two sequences that end early."""
  mask = jnp.arange(S)[None] < jnp.array([S, S, 2, S, S, 4, S, S])[:, None]
  ids = jax.random.randint(jax.random.key(5), (B, S), 0, V, jnp.int32)
  known = jax.random.normal(jax.random.key(8), (V, E))[ids]
  return table.context(token_ids=ids, mask=mask, shared={'read_me': known})


@functools.cache
def plans(row):
  """Skew -> the router's plan, of a bank of E experts, in NumPy."""
  options = dict(ROWS[row])
  router = make_router(options.pop('name'), d_model=D, num_experts=E, rngs=nnx.Rngs(0), **options)
  route = jax.jit(lambda x: router(x, context()))
  found = {skew: route(tokens(value)) for skew, value in SKEWS.items()}
  bank = lambda plan: plan if isinstance(plan, SoftPlan) else rows_of_bank(plan, E)
  return {skew: jax.tree.map(np.asarray, bank(plan)) for skew, plan in found.items()}


def kind_of(row) -> str:
  return KIND_OF.get(row, 'tokens')


def padded(plan: Assignment) -> tuple[np.ndarray, ...]:
  """token, expert, weight with T * E rows, so that plans of equal groups have equal shapes."""
  width = T * E // plan.groups

  def pad(a, fill):
    a = a.reshape(plan.groups, -1)
    fill = np.broadcast_to(fill, (plan.groups, width - a.shape[1])).astype(a.dtype)
    return np.concatenate([a, fill], 1).reshape(-1)

  first = np.arange(plan.groups)[:, None] * (T // plan.groups)
  return pad(plan.token, first), pad(plan.expert, E), pad(plan.weight, 0).astype(np.float64)


@functools.cache
def bank():
  """Experts in float64, made with x64 on."""
  experts = Experts(D, F, E, dtype=jnp.float64, rngs=nnx.Rngs(0))
  graph, state = nnx.split(experts)
  return graph, jax.tree.map(lambda w: w.astype(jnp.float64), state)


def compiled(exchange, groups, sharding=None, dispatch=einsum):
  """`(state, x, rows or slots) -> y, lost rows, gradients of all three` of a random projection of y."""
  graph, _ = bank()

  def scalar(state, x_td, rows):
    experts = nnx.merge(graph, state)
    if groups:
      token, expert, weight = rows
      plan = Assignment(token, expert, weight, expert, E, groups)
      y, lost = exchange(x_td, plan, experts, dispatch)
      lost = jnp.zeros((), int) if lost is None else lost.sum()
    else:
      y, lost = exchange.slots(rows[0], experts), jnp.zeros((), int)
    return (y * jax.random.normal(jax.random.key(3), y.shape, y.dtype)).sum(), (y, lost)

  run = jax.value_and_grad(scalar, (0, 1, 2), has_aux=True, allow_int=True)

  def call(x_td, rows):
    if sharding is not None:
      x_td, rows = jax.device_put((x_td, rows), sharding)
    (_, (y, lost)), gradients = jitted(bank()[1], x_td, rows)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]
    return np.asarray(y), int(lost), [g for g in leaves if g.dtype == np.float64]

  jitted = jax.jit(run)
  return call


@functools.cache
def inputs(row, skew):
  """Tokens, and rows or slots, of what this router makes of them; not to be written to."""
  plan = plans(row)[skew]
  x_td = np.asarray(tokens(SKEWS[skew]), np.float64).reshape(T, D)
  if isinstance(plan, SoftPlan):  # slots of the size of the largest plan
    dispatch = plan.dispatch.astype(np.float64)
    slots = np.einsum('bsep,bsd->bepd', dispatch, x_td.reshape(B, S, D))
    return x_td, (slots,)
  return x_td, padded(plan)


def scaled_difference(got, want) -> float:
  """Largest difference of two lists of arrays, each over its own largest entry."""
  return max(
    float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in zip(got, want, strict=True)
  )


@pytest.fixture(scope='module')
def references():
  """kind -> the program on one device."""
  return functools.cache(lambda kind: compiled(single, KINDS[kind]))


@pytest.fixture(scope='module')
def wanted(references):
  """(row, skew) -> what the program of its kind gives on one device."""
  return functools.cache(lambda row, skew: references(kind_of(row))(*inputs(row, skew)))


def covered(case, mesh, kind, full) -> bool:
  """Token choice goes every way on every mesh, the other kinds every way on a third of the meshes."""
  places = [
    list(names).index(name) for names, name in ((CASES, case), (MESHES, mesh), (KINDS, kind))
  ]
  return full or kind == 'tokens' or sum(places) % 3 == 0


def test_the_table_has_every_exchange_and_every_router():
  assert {name for name, _ in CASES.values()} == set(EXCHANGES)
  assert {options['name'] for options in ROWS.values()} == set(router_names())
  for row in ROWS:  # a row of another kind needs an entry in KIND_OF
    groups = {0 if isinstance(plan, SoftPlan) else plan.groups for plan in plans(row).values()}
    assert groups == {KINDS[kind_of(row)]}, row
  for case, kind in itertools.product(CASES, KINDS):
    assert any(covered(case, mesh, kind, full=False) for mesh in USUAL)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize('mesh', and_thorough(USUAL, MORE))
@pytest.mark.parametrize('case', CASES)
def test_every_router_goes_every_way(case, mesh, wanted, pytestconfig):
  """Outputs, and gradients by inputs, combine weights and experts, to 1e-12; loads even and skewed."""
  full = pytestconfig.getoption('--full-matrix')
  by_kind = {}
  for row, (skew, _) in itertools.product(ROWS, SKEWS.items()):
    by_kind.setdefault(kind_of(row), []).append((row, skew))
  for kind, rows in by_kind.items():
    if not covered(case, mesh, kind, full):
      continue
    reason = refusal(case, mesh, KINDS[kind])
    if reason:
      with pytest.raises(ValueError, match=reason):
        compiled(exchange_of(case, mesh), KINDS[kind])(*inputs(*rows[0]))
      continue
    sharding = NamedSharding(mesh_of(mesh), P())
    program = compiled(exchange_of(case, mesh), KINDS[kind], sharding)
    for row, skew in rows:
      y, lost, gradients = program(*inputs(row, skew))
      want_y, _, want = wanted(row, skew)
      assert lost == 0, (row, skew)
      assert scaled_difference([y, *gradients], [want_y, *want]) < 1e-12, (row, skew)


def test_some_loads_are_uneven_and_some_experts_idle():
  """What the matrix goes through is not only the easy case."""
  loads = {
    (row, skew): np.bincount(plan.expert, minlength=E + 1)[:E]
    for row in ROWS
    for skew, plan in plans(row).items()
    if isinstance(plan, Assignment)
  }
  uneven = [load.max() > 2 * load.mean() for (_, skew), load in loads.items() if skew == 'skewed']
  assert sum(uneven) >= len(uneven) / 2
  assert sum(load.min() == 0 for load in loads.values()) >= 10


@pytest.mark.usefixtures('x64')
def test_the_comparison_can_fail(references):
  """The same rows, each with its neighbour's expert: four orders of magnitude more than what the matrix allows."""
  x_td, (token, expert, weight) = inputs('top_k', 'even')
  y, _, gradients = references('tokens')(x_td, (token, expert, weight))
  moved = np.where(expert < E, (expert + 1) % E, E)
  far_y, _, far = references('tokens')(x_td, (token, moved, weight))
  assert scaled_difference([far_y, *far], [y, *gradients]) > 1e-2


def layer_program(row, exchange, sharding=None):
  """`(layer's state, x) -> loss, (y, aux losses, stats), gradients by router, experts and x`, for both skews."""
  layer = MoE(
    D,
    F,
    E,
    dict(ROWS[row]),
    losses={'balance': 1.0, 'z': 0.1, 'importance': 1.0, 'sequence_balance': 0.1},
    exchange=exchange,
    dispatch=einsum,
    dtype=jnp.float64,
    rngs=nnx.Rngs(0),
  )
  graph, params, rest = nnx.split(layer, nnx.Param, ...)
  params, rest = jax.tree.map(wide, (params, rest))

  def objective(params, x):
    y, aux = nnx.merge(graph, params, rest)(x, context())
    loss = (y * jax.random.normal(jax.random.key(3), y.shape, y.dtype)).sum()
    return loss + sum(aux.losses.values()), (y, aux.losses, aux.stats)

  run = jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
  return lambda x: run(params, x if sharding is None else jax.device_put(x, sharding))


@functools.cache
def layer_alone(row):
  """What the layer gives on one device, for each skew."""
  program = layer_program(row, single)
  return [jax.tree.map(np.asarray, program(wide(tokens(skew)))) for skew in SKEWS.values()]


def wide(leaf):
  return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def layer_cases(full):
  """(row, case, mesh): each router on one that works, all of these equally often; or all."""
  pairs = [(case, mesh) for mesh in MESHES if mesh != '1' for case in CASES]
  for index, row in enumerate(ROWS):
    groups = KINDS[kind_of(row)]
    fits = [
      pairs[(index + i) % len(pairs)]
      for i in range(len(pairs))
      if refusal(*pairs[(index + i) % len(pairs)], groups) is None
    ]
    yield from ((row, *pair) for pair in (fits if full else fits[:1]))


def pytest_generate_tests(metafunc):
  if 'layer_case' in metafunc.fixturenames:
    cases = [
      pytest.param(case, marks=unless(case[0] in LAYERS), id='-'.join(case))
      for case in layer_cases(metafunc.config.getoption('--full-matrix'))
    ]
    metafunc.parametrize('layer_case', cases)


@pytest.mark.usefixtures('x64')
def test_a_layer_on_a_mesh_is_the_layer_on_one_device(layer_case):
  """Routing on global arrays, the exchange, losses and statistics; every device has the same losses."""
  row, case, mesh = layer_case
  program = layer_program(row, exchange_of(case, mesh), NamedSharding(mesh_of(mesh), P(BATCH_AXES)))
  for skew, want in zip(SKEWS.values(), layer_alone(row), strict=True):
    got = program(wide(tokens(skew)))
    (_, (_, losses, stats)), _ = got
    for name, loss in losses.items():
      copies = {float(shard.data) for shard in loss.addressable_shards}
      assert len(copies) == 1, name
      assert len(loss.addressable_shards) == mesh_of(mesh).size
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
      a, b = np.asarray(a), np.asarray(b)
      assert np.abs(a - b).max() <= 1e-10 * max(np.abs(b).max(), 1e-2)
    assert float(stats.lost) == 0


@pytest.mark.usefixtures('x64')
def test_gradients_by_dropped_rows_are_zero_whatever_they_hold():
  """A row without expert, even of a token that is NaN, reaches nothing on its way."""
  x_td, (token, expert, weight) = inputs('top_k', 'even')
  x_td = np.where(np.arange(T)[:, None] < 7, np.nan, x_td)
  expert = np.where(token < 7, E, expert)
  for case in ('all_to_all', 'ragged_all_to_all'):
    program = compiled(exchange_of(case, '8'), T, NamedSharding(mesh_of('8'), P()), fused)
    y, lost, gradients = program(x_td, (token, expert, weight))
    assert lost == 0
    assert np.isfinite(y).all()
    assert all(np.isfinite(g).all() for g in gradients)
