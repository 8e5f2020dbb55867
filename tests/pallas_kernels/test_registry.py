"""Which body runs where."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Unsupported, expert_ffn, grouped_matmul, packed, registry
from pallas_kernels.expert_ffn.cases import CASES
from pallas_kernels.routing import reference
from tests.pallas_kernels import products


def trace(implementation=None, width=3, dtype='float32'):
  """A forward and backward pass of both operations."""

  def loss(x, weight, w):
    assignment = types.SimpleNamespace(
      token=jnp.arange(8, dtype=jnp.int32) // 2,
      expert=jnp.arange(8, dtype=jnp.int32) % 2,
      weight=weight,
      num_experts=2,
      groups=4,
    )
    y = expert_ffn(x, assignment, w, w, w, activation='silu', implementation=implementation)
    y = grouped_matmul(y, w, jnp.array([1, 3], jnp.int32), implementation=implementation)
    return jnp.sum(y)

  x, w = jnp.ones((4, width), dtype), jnp.ones((2, width, width), dtype)
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x, jnp.ones(8), w)


def lower(platform, *args):
  """The program that `trace` gives, lowered for `platform` without having one."""
  return trace(*args).lower(lowering_platforms=(platform,)).as_text()


def multiplies_batches(text):
  """Whether there is a product of several experts at once; for so few rows the body for CPUs makes none."""
  return re.search(r'batching_dims.* : \(tensor<(?!1x)', text) is not None


def test_the_cpu_walks_blocks_in_loops_and_other_platforms_multiply_batches():
  assert not multiplies_batches(lower('cpu'))
  assert multiplies_batches(lower('cuda')) and multiplies_batches(lower('tpu'))


@pytest.mark.parametrize('platform', ('cpu', 'cuda', 'tpu'))
def test_a_body_asked_for_by_name_is_taken_on_every_platform(platform):
  assert multiplies_batches(lower(platform, 'blocks'))
  assert not multiplies_batches(lower(platform, 'cpu'))


def test_gpus_of_every_generation_multiply_padded_blocks_by_xla():
  """No kernel for Hopper is a default: what is lowered for NVIDIA runs on sm_80, in float32 as in bfloat16."""
  for dtype in ('bfloat16', 'float32'):
    text = lower('cuda', None, 128, dtype)
    assert multiplies_batches(text) and 'mosaic_gpu' not in text and 'ragged_dot' not in text


@pytest.fixture
def kernels_by_default(monkeypatch):
  """As if the kernels of each platform had been measured there."""
  monkeypatch.setattr(registry, 'BY_PLATFORM', {'cpu': 'cpu', 'cuda': 'gpu', 'tpu': 'tpu'})
  # Routing has no body for GPUs; it is not what is tried here.
  monkeypatch.setattr(packed, 'sort_rows', functools.partial(_sorted, packed.Plan))


def _sorted(plan, expert, num_experts):
  return plan(*reference.pack(expert, num_experts=num_experts))


CALLS = {'cuda': 'mosaic_gpu', 'tpu': 'tpu_custom_call'}


@pytest.mark.usefixtures('kernels_by_default')
@pytest.mark.parametrize('platform', CALLS)
def test_a_default_that_cannot_leaves_the_work_to_padded_blocks(platform):
  """float16 is for the Hopper kernels only, float32 for the TPU's only, odd widths for no GPU's."""
  kernels = {
    (width, dtype): CALLS[platform] in lower(platform, None, width, dtype)
    for width, dtype in ((128, 'bfloat16'), (128, 'float32'), (128, 'float16'), (3, 'float32'))
  }
  of = {'cuda': (True, False, True, False), 'tpu': (True, True, False, True)}
  assert tuple(kernels.values()) == of[platform]
  assert multiplies_batches(
    lower(platform, None, 128, {'cuda': 'float32', 'tpu': 'float16'}[platform])
  )


def test_a_body_asked_for_by_name_never_leaves_the_work_to_another():
  with pytest.raises(Unsupported, match='multiplies rows of bfloat16 or float16, not float32'):
    trace('gpu', 128, 'float32')
  with pytest.raises(Unsupported, match='wants multiples of 128, d_model=3'):
    trace('gpu', 3, 'bfloat16')
  with pytest.raises(Unsupported, match='x float16'):
    trace('tpu', 128, 'float16')


@pytest.mark.parametrize(('num_rows', 'num_experts'), [(8, 2), (700, 4), (96, 1)])
@pytest.mark.usefixtures('kernels_by_default')
def test_all_bodies_save_arrays_of_one_shape(num_rows, num_experts):
  """Few rows, rows that no tile divides, one expert."""
  operation, saved = 'pallas_kernels.expert_ffn', {}
  rows = registry.largest(operation, 'saved_rows', None, num_rows, num_experts)
  x, w = jnp.ones((num_rows, 128), jnp.bfloat16), jnp.ones((num_experts, 128, 256), jnp.bfloat16)
  index = jnp.arange(num_rows, dtype=jnp.int32)
  plan = _sorted(packed.Plan, index % num_experts, num_experts)
  options = dict(activation='silu', groups=num_rows, save=rows)
  for name in ('blocks', 'cpu', 'gpu', 'tpu'):
    arguments = x, index, jnp.ones(num_rows), plan, (w, w), w.swapaxes(1, 2)
    run = functools.partial(registry.run, operation, 'forward', name, **options)
    saved[name] = jax.eval_shape(run, *arguments)[1]
    assert rows >= registry.largest(operation, 'saved_rows', name, num_rows, num_experts)
  assert {(s.shape, str(s.dtype)) for s in saved.values()} == {((2, rows, 256), 'bfloat16')}


@pytest.mark.usefixtures('kernels_by_default')
def test_the_cpu_is_right_with_room_for_what_a_gpu_would_save():
  case = next(case for case in CASES if case.name == 'uneven, some dropped')
  arrays = products.ffn_inputs(case, 'bfloat16')
  found, wanted = products.ffn(arrays, None), products.ffn_by_reference(arrays)
  assert max(products.distance(found[name], wanted[name]) for name in wanted) < 2e-2


def test_a_name_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match="implementation='gpu' of op does not exist.*'a', 'b'"):
    registry.check_name('op', 'gpu', ('b', 'a'))


def test_unsupported_is_a_not_implemented_error():
  with pytest.raises(NotImplementedError, match='op: x is int32'):
    registry.check_dtypes('op', x=jnp.ones(2, jnp.int32), y=None)


def test_sums_are_kept_in_float32_or_wider():
  assert registry.accumulator(jnp.ones(1, jnp.bfloat16)) == jnp.float32
  with jax.enable_x64(True):
    assert registry.accumulator(jnp.ones(1, jnp.float32), jnp.ones(1)) == jnp.float64
