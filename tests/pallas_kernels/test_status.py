"""The README of the kernels says what the code and the tests say."""

import functools
import importlib
import json
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import (
  Unsupported,
  exchange_matmul,
  expert_ffn,
  grouped_matmul,
  quantise,
  quantised_matmul,
  ragged_all_to_all,
  status,
  top_k,
)
from pallas_kernels.ampere import machine
from tests.conftest import ROOT
from tests.pallas_kernels import (
  test_ampere,
  test_ampere_compiled,
  test_ampere_ffn,
  test_exchange_matmul,
  test_expert_ffn,
  test_gpu_compiled,
  test_gpu_interpreted,
  test_gpu_quantised,
  test_grouped_matmul,
  test_quantised_matmul,
  test_ragged_all_to_all,
  test_routing,
  tpu_programs,
)

TESTS = {
  'exchange_matmul': test_exchange_matmul,
  'expert_ffn': test_expert_ffn,
  'grouped_matmul': test_grouped_matmul,
  'quantised_matmul': test_quantised_matmul,
  'ragged_all_to_all': test_ragged_all_to_all,
  'routing': test_routing,
}
# Tests that run a body and that compile it.
OF_NVIDIA = {
  'ampere': ((test_ampere, test_ampere_ffn), test_ampere_compiled),
  'gpu': ((test_gpu_interpreted, test_gpu_quantised), test_gpu_compiled),
}
ROWS = [(op, body) for op, bodies in status.TABLE.items() for body in bodies]


def test_the_readme_is_what_the_table_says():
  written = (ROOT / 'pallas_kernels' / 'README.md').read_text(encoding='utf-8')
  assert written == status.readme(), (
    'scripts/python -m pallas_kernels.status > pallas_kernels/README.md'
  )


def test_every_operation_and_body_has_its_row():
  folders = {path.parent.name for path in (ROOT / 'pallas_kernels').glob('*/reference.py')}
  assert folders == set(status.TABLE) == set(status.DOES)
  for operation, bodies in status.TABLE.items():
    names = importlib.import_module(f'pallas_kernels.{operation}').NAMES
    assert {*bodies, 'reference'} == set(names)
    assert all((ROOT / 'pallas_kernels' / operation / f'{body}.py').exists() for body in bodies)


@pytest.mark.parametrize(('operation', 'body'), ROWS)
def test_each_word_of_a_proof_has_its_evidence(operation, body):
  proof = status.TABLE[operation][body].proof
  assert set(proof) <= set(status.PROOFS)
  assert ('interpreted' in proof) == (body in ('gpu', 'tpu'))
  assert ('simulated' in proof) == (body == 'ampere')
  if body in OF_NVIDIA:
    runs, compiled_by = OF_NVIDIA[body]
    script = (ROOT / compiled_by.SCRIPT).read_text(encoding='utf-8')
    compiled = f'from pallas_kernels.{operation} import {body}' in script
    right = f'test_{operation}_is_right_in_value'
    tested = any(hasattr(run, right + more) for run in runs for more in ('', '_and_gradient'))
  else:
    compiled = body == 'tpu' and any(p.operation == operation for p in tpu_programs.PROGRAMS)
    tested = body in TESTS[operation].BODIES
  assert tested and ('compiled' in proof) == compiled
  path = ROOT / 'experiments' / 'results' / 'bench_kernels' / 'result.json'
  rows = json.loads(path.read_text(encoding='utf-8'))['rows']
  aliases = {'pack': 'routing', 'top_k': 'routing'}
  timed = {
    (aliases.get(r['operation'], r['operation']), r['implementation'])
    for r in rows
    if 'milliseconds' in r
  }
  assert ('measured' in proof) == ((operation, body) in timed)


def _call(operation, body, dtype):
  # Widths that every body takes.
  x, w = jnp.ones((4, 128), dtype), jnp.ones((2, 128, 128), dtype)
  if operation == 'routing':
    return top_k(x, 2, implementation=body)
  if operation == 'grouped_matmul':
    return grouped_matmul(x, w, jnp.array([1, 3], jnp.int32), implementation=body)
  if operation == 'quantised_matmul':
    weights = quantise(w.astype(jnp.float32))
    return quantised_matmul(x, weights, jnp.array([1, 3], jnp.int32), implementation=body)
  if operation in ('exchange_matmul', 'ragged_all_to_all'):
    mesh = jax.make_mesh((1,), ('expert',), axis_types=(jax.sharding.AxisType.Auto,))
    options = dict(axis_name='expert', num_out_rows=16, implementation=body)
    send = lambda x, sizes: ragged_all_to_all(x, sizes, **options)
    sizes = jnp.ones((1, 1), jnp.int32)
    if operation == 'exchange_matmul':
      send = lambda x, sizes: exchange_matmul(x, sizes, (jnp.ones((1, 3, 4), dtype),), **options)[0]
      sizes = sizes[None]
    send = jax.shard_map(send, mesh=mesh, in_specs=(P(), P()), out_specs=P('expert'))
    return send(jnp.ones((16, 3), dtype), sizes)
  rows = jnp.arange(4, dtype=jnp.int32)
  fields = dict(token=rows, expert=rows % 2, weight=jnp.ones(4, dtype), num_experts=2, groups=4)
  assignment = types.SimpleNamespace(**fields)
  return expert_ffn(x, assignment, w, w, w, activation='silu', implementation=body)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(('operation', 'body'), ROWS)
def test_a_body_takes_the_types_of_its_row_and_no_others(operation, body):
  taken = status.TABLE[operation][body].types
  late = body == 'ampere' and not hasattr(machine.plgpu, 'mma')
  for dtype in status.ALL:
    ask = functools.partial(jax.eval_shape, lambda dtype=dtype: _call(operation, body, dtype))
    if dtype in taken and not late:
      assert ask() is not None
      continue
    with pytest.raises(Unsupported, match='needs jax 0.11' if dtype in taken else dtype):
      ask()


@pytest.mark.parametrize(
  ('operation', 'body'),
  [row for row in ROWS if row[1] in OF_NVIDIA and row[0] != 'routing'],
)
def test_float32_by_name_on_a_gpu_is_refused_with_one_sentence(operation, body):
  sentence = (
    f'{operation}: implementation={body!r} multiplies rows of bfloat16 or float16, not float32'
  )
  with pytest.raises(Unsupported) as error:
    jax.eval_shape(lambda: _call(operation, body, 'float32'))
  assert str(error.value).splitlines()[0] == sentence
