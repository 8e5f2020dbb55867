"""Which body runs where."""

import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import expert_ffn, grouped_matmul, registry


def lower(platform, implementation=None):
  """The program of a forward and backward pass, lowered for `platform` without having one."""

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

  traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(
    jnp.ones((4, 3)), jnp.ones(8), jnp.ones((2, 3, 3))
  )
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_cpu_walks_blocks_in_loops_and_other_platforms_multiply_batches():
  assert 'batching_dims' not in lower('cpu')
  assert 'batching_dims' in lower('cuda') and 'batching_dims' in lower('tpu')


@pytest.mark.parametrize('platform', ('cpu', 'cuda', 'tpu'))
def test_a_body_asked_for_by_name_is_taken_on_every_platform(platform):
  assert 'batching_dims' in lower(platform, 'blocks')
  assert 'batching_dims' not in lower(platform, 'cpu')


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
