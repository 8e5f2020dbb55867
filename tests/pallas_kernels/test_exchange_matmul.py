"""Matmuls of experts on other devices, against loops over segments: four simulated devices and their copies."""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import Unsupported, exchange_matmul, matmul_exchange, tpu_copies, tpu_tiles
from pallas_kernels.exchange_matmul.cases import CASES, DEVICES, EXPERTS, ROWS
from pallas_kernels.segments import CHUNK
from pallas_kernels.tpu_tiles import Tiles
from tests.pallas_kernels.interpreted import interpreted
from tests.pallas_kernels.products import distance
from tests.thorough import and_thorough, thorough, unless

BODIES = ('tpu',)
WIDTH, HIDDEN = 8, 12
USUAL = (
  'around the width of a copy',
  'nothing',
  'one device sends nothing',
  'an expert is empty',
  'skewed',
)
"""Cases of the default suite; the others are among the thorough tests."""


def pytest_generate_tests(metafunc):
  # The gradient of either operation is the other's kernel: one of them runs both. With --full-matrix all.
  if metafunc.function.__name__.startswith('test_each_row'):
    full = metafunc.config.getoption('--full-matrix')
    back = CASES if full else ('skewed', 'around the width of a copy')
    pairs = [*(('there', case) for case in CASES), *(('back', case) for case in back)]
    usual = lambda operation, case: case == 'skewed' or (operation == 'there' and case in USUAL)
    params = [pytest.param(*pair, marks=unless(usual(*pair))) for pair in pairs]
    metafunc.parametrize(('operation', 'case'), params)


def segments(sizes):
  """(source, device, expert, rows at the source, rows at the device) of every segment, by counting."""
  upto = lambda size: -(-size // CHUNK) * CHUNK
  sent, places = [0] * DEVICES, {}
  for s, d, e in np.ndindex(sizes.shape):
    places[s, d, e] = sent[s]
    sent[s] += upto(sizes[s, d, e])
  came = [0] * DEVICES
  for d, e, s in np.ndindex(sizes.shape[1], sizes.shape[2], sizes.shape[0]):
    size, source = sizes[s, d, e], places[s, d, e]
    yield s, d, e, slice(source, source + size), slice(came[d], came[d] + size)
    came[d] += upto(size)
  assert max(sent + came) <= ROWS


def arrays(sizes, width=WIDTH, hidden=HIDDEN):
  """Rows, NaN between the segments, two matrices, and gradients of the results, by name and in float64."""
  rng = np.random.default_rng(0)
  out = {
    'x': np.full((DEVICES, ROWS, width), np.nan),
    'rhs': rng.normal(size=(2, DEVICES, EXPERTS, width, hidden)),
    'dout': np.full((2, DEVICES, ROWS, hidden), np.nan),
  }
  for s, d, _, source, here in segments(sizes):
    out['x'][s, source] = rng.normal(size=(sizes[s, d, _], width))
    out['dout'][:, d, here] = rng.normal(size=(2, sizes[s, d, _], hidden))
  return out


def by_hand(sizes, x, rhs, dout):
  """(outs, dx, drhs) of `exchange_matmul`: of `matmul_exchange` they are dlhs, the result and drhs."""
  outs, dx, drhs = np.zeros(dout.shape), np.zeros(x.shape), np.zeros(rhs.shape)
  for s, d, e, source, here in segments(sizes):
    for i in range(2):
      outs[i, d, here] = x[s, source] @ rhs[i, d, e]
      dx[s, source] += dout[i, d, here] @ rhs[i, d, e].T
      drhs[i, d, e] += x[s, source].T @ dout[i, d, here]
  return outs, dx, drhs


def one_device(operation, implementation, transpose_rhs=False):
  """`(rows, sizes, rhs) -> result` on each device."""
  call = {'there': exchange_matmul, 'back': matmul_exchange}[operation]
  options = dict(transpose_rhs=transpose_rhs, implementation=implementation)
  return functools.partial(call, axis_name='expert', num_out_rows=ROWS, **options)


def all_devices(local, implementation, make_mesh):
  """The compiled function of all devices; their arrays are parts of the first axis, of which sizes have none."""

  def on_each(rows, sizes, *arrays):
    part = lambda tree: jax.tree.map(lambda a: a[0], tree)
    found = local(part(rows), sizes, *part(arrays))
    return jax.tree.map(lambda a: a[None], found)

  def on_all(rows, sizes, *arrays):
    specs = P('expert'), P(), *(P('expert'),) * len(arrays)
    # The interpreter does not know over which axes values vary.
    options = dict(in_specs=specs, out_specs=P('expert'), check_vma=implementation != 'tpu')
    return jax.shard_map(on_each, mesh=make_mesh(expert=DEVICES), **options)(rows, sizes, *arrays)

  return jax.jit(on_all)


@functools.cache
def program(operation, implementation, transpose_rhs, make_mesh):
  """A compiled function `(rows, sizes, rhs, gradient) -> (result, d rows, d rhs)`."""
  call = one_device(operation, implementation, transpose_rhs)

  def local(rows, sizes, rhs, gradient):
    out, pull = jax.vjp(lambda rows, rhs: call(rows, sizes, rhs), rows, rhs)
    return out, *pull(gradient)

  return all_devices(local, implementation, make_mesh)


def run(
  operation,
  implementation,
  sizes,
  made,
  make_mesh,
  transpose_rhs=False,
  dtype=np.float32,
  program=program,
):
  """(outs, dx, drhs) as of `by_hand`."""
  narrow = lambda a: jnp.asarray(a, dtype)
  x, dout = narrow(made['x']), tuple(narrow(made['dout']))
  back = operation == 'back'
  # The way back multiplies by the transposed matrices, so that it is the gradient of the way there.
  turned = back != transpose_rhs
  rhs = tuple(narrow(w.swapaxes(2, 3) if turned else w) for w in made['rhs'])
  with interpreted(implementation):
    call = program(operation, implementation, transpose_rhs, make_mesh)
    rows, gradient = (dout, x) if back else (x, dout)
    found, drows, drhs = jax.block_until_ready(
      call(rows, jnp.asarray(sizes, jnp.int32), rhs, gradient)
    )
  outs, dx = (drows, found) if back else (found, drows)
  wide = lambda a: np.asarray(a, np.float64)
  drhs = np.stack([wide(w).swapaxes(2, 3) if turned else wide(w) for w in drhs])
  return np.stack([wide(o) for o in outs]), wide(dx), drhs


def assert_close(found, wanted, tolerance):
  for name, one, other in zip(('outs', 'dx', 'drhs'), found, wanted, strict=True):
    assert distance(one, other) < tolerance, name


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_each_row_meets_its_expert_and_its_gradient_comes_back(
  case, implementation, operation, make_mesh
):
  sizes = CASES[case]
  made = arrays(sizes)
  found = run(operation, implementation, sizes, made, make_mesh)
  assert_close(found, by_hand(sizes, **made), 2e-6)


def _tiled(monkeypatch, rows, columns=None):
  """Kernels with tiles of these heights and widths."""
  fit = lambda *shape, **_: Tiles(rows, shape[2], min(columns or shape[3], shape[3]))
  monkeypatch.setattr(tpu_tiles, 'for_rows', fit)


@pytest.mark.parametrize(
  ('operation', 'case', 'rows', 'transpose_rhs'),
  [('there', 'skewed', 32, True), thorough('back', 'all to one expert', 256, False)],
)
def test_an_expert_of_several_tiles(case, rows, transpose_rhs, operation, make_mesh, monkeypatch):
  """Two tiles of columns; tiles of 32 rows, of which an expert has many, and of 256, of which parts are computed."""
  _tiled(monkeypatch, rows, 128)
  sizes = CASES[case]
  made = arrays(sizes, 128, 256)
  fresh = program.__wrapped__  # not the program that other tests have compiled
  found = run(operation, 'tpu', sizes, made, make_mesh, transpose_rhs, program=fresh)
  assert_close(found, by_hand(sizes, **made), 5e-6)


@pytest.mark.parametrize('operation', and_thorough(['there'], ['back']))
def test_sixteen_bits_are_multiplied_as_they_are(operation, make_mesh):
  """Of inputs that bfloat16 holds exactly; results and gradients are rounded once."""
  sizes = CASES['around the width of a copy']
  made = {k: np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for k, a in arrays(sizes).items()}
  found = run(operation, 'tpu', sizes, made, make_mesh, dtype=jnp.bfloat16)
  assert_close(found, by_hand(sizes, **made), 2**-8)


# Rows of one segment for each expert: four tiles of 32 rows for the first, none for the second, two for the last.
FEW = np.broadcast_to(np.array([32, 0, 16]), (DEVICES, DEVICES, EXPERTS))
LAST = 16


class Copy(NamedTuple):
  """Something that happened to a copy, on a device that waits for it, or starts it."""

  event: str
  device: int
  rows: int
  columns: int
  remote: bool


def _copies(operation, make_mesh, monkeypatch):
  """All copies of one call, in order.

  The interpreter makes a copy when somebody waits for it, so 'made' is the first time at which a kernel needs it.
  """
  module = importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call')
  log = []

  class Logged(module.DMA):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      self.note('started', self.src_device_id, self.src_transforms)

    def execute_write(self):
      if self.state != module.DmaState.COMPLETED:
        self.note('made', self.dst_device_id, self.dst_transforms)
      super().execute_write()

    def note(self, event, device, transforms):
      *_, rows, columns = (i.size for i in transforms[-1].indices if hasattr(i, 'size'))
      log.append(Copy(event, int(device), int(rows), int(columns), self.src_sem is not None))

  monkeypatch.setattr(module, 'DMA', Logged)
  _tiled(monkeypatch, 32)
  made = {name: jnp.asarray(a, jnp.float32) for name, a in arrays(FEW).items()}
  rows = made['x'] if operation == 'there' else tuple(made['dout'])
  rhs = tuple(made['rhs'] if operation == 'there' else made['rhs'].swapaxes(3, 4))
  with interpreted('tpu'):
    call = all_devices(one_device(operation, 'tpu'), 'tpu', make_mesh)
    jax.block_until_ready(call(rows, jnp.asarray(FEW, jnp.int32), rhs))
  return log


def _until(log, device, stop):
  """What happens on a device until an event for which `stop` is true."""
  mine = [copy for copy in log if copy.device == device]
  return mine[: [stop(copy) for copy in mine].index(True)]


def _results(log, columns):
  """Tiles of results that have left the core; matrices have no multiple of 16 rows."""
  of = lambda c: c.event == 'started' and not c.remote and c.rows % CHUNK == 0
  return sum(of(copy) and copy.columns == columns for copy in log)


def test_the_first_expert_is_multiplied_before_rows_of_the_last_have_come(make_mesh, monkeypatch):
  """Two results of four tiles are on their way from the core when it first waits for rows of the last expert."""
  log = _copies('there', make_mesh, monkeypatch)
  arrives = lambda copy: copy.event == 'made' and copy.remote and copy.rows == LAST
  for device in range(DEVICES):
    assert _results(_until(log, device, arrives), HIDDEN) == 8


def test_the_control_waits_for_all_rows_first(make_mesh, monkeypatch):
  send_all, wait_for = tpu_copies.Copies.send_all, tpu_copies.Copies.wait_for

  def send_and_wait(copies):
    send_all(copies)
    for expert in range(EXPERTS):
      wait_for(copies, expert)

  monkeypatch.setattr(tpu_copies.Copies, 'send_all', send_and_wait)
  monkeypatch.setattr(tpu_copies.Copies, 'wait_for', lambda copies, expert: None)
  log = _copies('there', make_mesh, monkeypatch)
  arrives = lambda copy: copy.event == 'made' and copy.remote and copy.rows == LAST
  for device in range(DEVICES):
    assert _results(_until(log, device, arrives), HIDDEN) == 0


def test_results_of_the_first_expert_go_home_before_the_last_is_multiplied(make_mesh, monkeypatch):
  """Four tiles of the first expert and one of the two of the last are made when the first copies leave."""
  log = _copies('back', make_mesh, monkeypatch)
  leaves = lambda copy: copy.event == 'started' and copy.remote
  for device in range(DEVICES):
    assert _results(_until(log, device, leaves), WIDTH) == 5


@pytest.mark.parametrize('implementation', ('reference', *BODIES))
def test_rows_without_room_are_lost_and_nothing_else(implementation, make_mesh):
  """Device 2 has 256 rows, and is sent four times 80 for its first expert and four times 16 for its last."""
  sizes = np.zeros((DEVICES, DEVICES, EXPERTS), np.int64)
  sizes[:, 2] = [80, 0, 16]
  rng = np.random.default_rng(0)
  x = rng.normal(size=(DEVICES, ROWS, WIDTH)).astype(np.float32)
  rhs = (rng.normal(size=(DEVICES, EXPERTS, WIDTH, HIDDEN)).astype(np.float32),)
  with interpreted(implementation):
    call = all_devices(one_device('there', implementation), implementation, make_mesh)
    (out,) = jax.block_until_ready(call(x, jnp.asarray(sizes, jnp.int32), rhs))
  wanted = np.zeros((DEVICES, ROWS, HIDDEN))
  wanted[2] = x[:, :80].reshape(-1, WIDTH)[:ROWS] @ rhs[0][2, 0]
  assert distance(out, wanted) < 2e-6


def test_devices_of_another_axis_exchange_among_themselves(make_mesh):
  """Two groups of four devices with rows and sizes of their own, on a mesh of which the expert axis is not the last."""
  cases = [CASES['skewed'], CASES['one device sends nothing']]
  made = [arrays(sizes) for sizes in cases]
  rhs = np.asarray(made[0]['rhs'][0], np.float32)
  x = np.stack([one['x'] for one in made], 1).astype(np.float32)

  def local(x, sizes, rhs):
    (out,) = one_device('there', 'tpu')(x[0, 0], sizes[0], (rhs[0],))
    return out[None, None]

  specs = P('expert', 'data'), P('data'), P('expert')
  options = dict(in_specs=specs, out_specs=P('expert', 'data'), check_vma=False)
  with interpreted('tpu'):
    run = jax.jit(jax.shard_map(local, mesh=make_mesh(expert=4, data=2), **options))
    out = jax.block_until_ready(run(x, jnp.asarray(np.stack(cases), jnp.int32), rhs))
  for group, (sizes, one) in enumerate(zip(cases, made, strict=True)):
    wanted = by_hand(sizes, one['x'], made[0]['rhs'], one['dout'])[0][0]
    assert distance(np.asarray(out)[:, group], wanted) < 2e-6


def test_bad_arguments_are_refused(make_mesh):
  x, w = jnp.ones((DEVICES, ROWS, WIDTH)), jnp.ones((DEVICES, EXPERTS, WIDTH, HIDDEN))
  sizes = jnp.ones((DEVICES, DEVICES, EXPERTS), jnp.int32)

  def there(x=x, sizes=sizes, rhs=(w,), **options):
    local = functools.partial(one_device('there', None), **options)
    return jax.eval_shape(all_devices(local, 'tpu', make_mesh), x, sizes, rhs)

  assert there()[0].shape == (DEVICES, ROWS, HIDDEN)
  with pytest.raises(ValueError, match=r'sizes int32\(4, 4, 2\), expected int32\(4, 4, 3\)'):
    there(sizes=sizes[..., :2])
  with pytest.raises(ValueError, match="implementation='fast'"):
    there(implementation='fast')
  with pytest.raises(
    ValueError, match=r'\[\(256, 8\)\] and \[\(3, 12, 8\)\] with transpose_rhs=False'
  ):
    there(rhs=(w.swapaxes(2, 3),))
  with pytest.raises(ValueError, match='1 operands and 0 matrices'):
    there(rhs=())
  with pytest.raises(Unsupported, match=r'out float32\(100, 12\) and .*multiples of 16'):
    there(implementation='tpu', num_out_rows=100)
  with pytest.raises(Unsupported, match='float16'):
    there(x=x.astype(jnp.float16), implementation='tpu')
