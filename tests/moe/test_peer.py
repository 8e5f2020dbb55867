"""Retrieval among many tiny experts: exact, causal, and never a tokens-times-experts array."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context
from moejax.mesh.make import BATCH_AXES, make_mesh
from moejax.mesh.traffic import collectives
from moejax.moe.neurons import CHUNK, neurons
from moejax.moe.peer import Peer
from moejax.moe.product_keys import CHUNK as KEYS_CHUNK
from moejax.moe.product_keys import product_top_k, retrieve
from moejax.transformer.attention import Attention
from moejax.transformer.block import Block
from moejax.transformer.linear import fan_in_init
from tests.precisions import precisions

D, N = 8, 64


def make(**options):
  sizes = {'heads': 2, 'k': 3, 'query_width': 6}
  return Peer(D, N, **(sizes | options), rngs=nnx.Rngs(0))


def tokens(shape=(2, 5, D), dtype=jnp.float32):
  return jax.random.normal(jax.random.key(1), shape, dtype)


def test_accelerators_are_not_to_cut_the_inputs_of_the_products_that_choose():
  peer = make()
  found = precisions(jax.make_jaxpr(lambda x: peer.retrieve(x)[0])(tokens()).jaxpr)
  assert found == [(jax.lax.Precision.HIGHEST,) * 2] * 3  # queries, and keys of either side


def test_the_three_best_pairs_of_four_by_four():
  first, second = jnp.array([0.3, 1.2, -0.4, 0.9]), jnp.array([0.7, -0.2, 1.1, 0.5])
  value, index = product_top_k(first, second, 3)
  assert index.tolist() == [6, 14, 4]
  np.testing.assert_allclose(value, [2.3, 2.0, 1.9], rtol=1e-6)
  np.testing.assert_allclose(jax.nn.softmax(value), [0.414742, 0.307248, 0.278010], atol=1e-6)


@pytest.mark.parametrize('k', [1, 3, 16])
def test_retrieval_is_the_brute_force_over_all_pairs(k):
  first, second = jax.random.normal(jax.random.key(0), (2, 50, 16))
  value, index = (part.T for part in product_top_k(first.T, second.T, k))
  scores = (np.asarray(first)[:, :, None] + np.asarray(second)[:, None, :]).reshape(50, -1)
  want = np.argsort(-scores, 1, kind='stable')[:, :k]
  np.testing.assert_array_equal(index, want)
  np.testing.assert_allclose(value, np.take_along_axis(scores, want, 1), rtol=1e-6)


def brute(layer, x, score='softmax'):
  """Every neuron on every token, by definition; the brute force over all keys too."""
  query = (x @ layer.query.weight[...]).reshape(*x.shape[:-1], layer.heads, -1)
  if layer.query_norm is not None:
    query = query - query.mean(-1, keepdims=True)
    query = query / jnp.sqrt((query**2).mean(-1, keepdims=True) + 1e-6)
    scale, bias = (
      p[...].reshape(1, 1, 1, -1) for p in (layer.query_norm.scale, layer.query_norm.bias)
    )
    query = query * scale + bias
  half = query.shape[-1] // 2
  y = jnp.zeros_like(x)
  for head in range(layer.heads):
    keys = layer.keys[...] if layer.keys[...].ndim == 3 else layer.keys[...][:, head]
    first = query[..., head, :half] @ keys[0].T
    second = query[..., head, half:] @ keys[1].T
    scores = (first[..., :, None] + second[..., None, :]).reshape(*x.shape[:-1], -1)
    kth = jnp.sort(scores, -1)[..., -layer.k][..., None]
    chosen = scores >= kth
    gate = {
      'softmax': lambda s, c=chosen: jax.nn.softmax(jnp.where(c, s, -jnp.inf), -1),
      'sigmoid': jax.nn.sigmoid,
      'relu': jax.nn.relu,
    }[score](scores)
    hidden = jax.nn.gelu(x @ layer.w_up[...].T) * jnp.where(chosen, gate, 0)
    y = y + hidden @ layer.w_down[...]
  return y


@pytest.mark.parametrize(
  'options',
  [{}, {'keys_per_head': True, 'score': 'sigmoid'}, {'score': 'relu', 'query_norm': False, 'k': 1}],
  ids=['paper', 'sigmoid', 'relu'],
)
def test_value_and_gradient_are_those_of_all_neurons(options):
  """float64, by a loop over heads with dense scores."""
  with jax.enable_x64(True):
    graph, state = nnx.split(make(**options, dtype=jnp.float64))
    state = jax.tree.map(lambda w: w.astype(jnp.float64), state)
    x = tokens(dtype=jnp.float64)
    target = jax.random.normal(jax.random.key(2), x.shape, x.dtype)

    def by_layer(state, x):
      return (nnx.merge(graph, state)(x)[0] * target).sum()

    def by_definition(state, x):
      score = options.get('score', 'softmax')
      return (brute(nnx.merge(graph, state), x, score) * target).sum()

    got, want = (
      jax.jit(jax.value_and_grad(f, (0, 1)))(state, x) for f in (by_layer, by_definition)
    )
    np.testing.assert_allclose(got[0], want[0], rtol=1e-10)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    for leaf in jax.tree.leaves(got[1]):
      assert float(jnp.abs(leaf).max()) > 1e-6


def test_chunks_of_tokens_do_not_show():
  """More tokens than one chunk, and not a multiple of it."""
  num_tokens, k, experts = CHUNK + 7, 4, 32
  keys = jax.random.split(jax.random.key(0), 5)
  x = jax.random.normal(keys[0], (num_tokens, D))
  expert = jax.random.randint(keys[1], (num_tokens, k), 0, experts, jnp.int32)
  weight = jax.random.normal(keys[2], (num_tokens, k))
  up, down = (jax.random.normal(key, (experts, D)) for key in keys[3:])

  def plain(x, weight, up, down):
    hidden = jax.nn.gelu(x @ up.T)
    gate = jnp.zeros((num_tokens, experts))
    gate = gate.at[jnp.arange(num_tokens)[:, None], expert].add(weight)
    return (jnp.sin((hidden * gate) @ down)).sum()

  def chunked(x, weight, up, down):
    return jnp.sin(neurons('gelu', x, expert, weight, up, down)).sum()

  got, want = (jax.value_and_grad(f, (0, 1, 2, 3))(x, weight, up, down) for f in (chunked, plain))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-4)
  for a, b in zip(got[1], want[1], strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4)


def shapes_of(jaxpr):
  for equation in jaxpr.eqns:
    yield from (value.aval.shape for value in equation.outvars if hasattr(value.aval, 'shape'))
    for inner in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, 'eqns') or hasattr(p, 'jaxpr')
    ):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from shapes_of(inner)


def test_a_million_experts_make_no_array_of_tokens_times_experts():
  """Forward and backward of 512 tokens: the largest arrays are the tables and their gradients."""
  experts, width, num_tokens = 1024**2, 64, 512

  def run(key, x):
    graph, state = nnx.split(Peer(width, experts, rngs=nnx.Rngs(key)))
    loss = lambda state: nnx.merge(graph, state)(x, Context(train=True))[0].sum()
    return jax.grad(loss)(state)

  x = jax.ShapeDtypeStruct((1, num_tokens, width), jnp.float32)
  jaxpr = jax.make_jaxpr(run)(jax.random.key(0), x)
  shapes = set(shapes_of(jaxpr.jaxpr))
  assert (experts, width) in shapes
  assert max(np.prod(shape) for shape in shapes) == experts * width
  assert not [s for s in shapes if experts in s and s not in ((experts,), (experts, width))]


def test_padding_is_invisible_and_statistics_count_what_is_real():
  layer = make()
  mask = jnp.arange(5)[None] < jnp.array([5, 3])[:, None]
  clean = jnp.where(mask[..., None], tokens(), 0)
  y, aux = layer(jnp.where(mask[..., None], clean, jnp.nan), Context(mask=mask))
  want, _ = layer(clean, Context(mask=mask))
  np.testing.assert_array_equal(y, want)
  assert float(jnp.abs(y[1, 3:]).max()) == 0
  assert float(aux.stats.tokens) == 8
  assert float(aux.stats.chosen_e.sum()) == 8 * 6
  assert float(aux.stats.prob_e.sum()) == pytest.approx(8, rel=1e-5)
  assert float(aux.stats.weight_e.sum()) == pytest.approx(16, rel=1e-5)
  assert 0 < float(aux.metrics['used']) <= 48 / N
  assert float(aux.metrics['unevenness']) >= np.log(N / 48) - 1e-5


def test_no_token_sees_another():
  layer, x = make(), tokens()
  changed = x.at[0, 3:].set(7.0).at[1].set(-1.0)
  np.testing.assert_allclose(layer(changed)[0][0, :3], layer(x)[0][0, :3], atol=1e-6)


def test_with_one_expert_a_head_it_is_a_small_dense_layer():
  layer, x = make(k=1), tokens()
  _, expert = layer.retrieve(x)
  want = sum(
    jnp.stack([layer.expert(int(expert[b, s, h, 0]))(x[b, s]) for b in range(2) for s in range(5)])
    for h in range(2)
  )
  np.testing.assert_allclose(layer(x)[0].reshape(10, D), want, atol=1e-6)


def test_a_block_takes_it_as_its_mixture():
  rngs = nnx.Rngs(0)
  attention = Attention(D, 2, 2, 4, causal=True, out_init=fan_in_init, rngs=rngs)
  block = Block(D, attention=attention, moe=make(), rngs=rngs)
  y, (stats,), _ = block(tokens(), Context(train=True))
  assert y.shape == (2, 5, D)
  assert stats.chosen_e.shape == (8,)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'k': 9}, 'k=9 with num_experts=64: accepted are 1 to 8'),
    ({'score': 'max'}, "score='max': accepted are 'relu'"),
    ({'query_width': 5}, 'query_width=5: accepted are even integers from 2'),
    ({'heads': 0}, 'heads=0: accepted are integers from 1'),
  ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
  with pytest.raises(ValueError, match=message):
    make(**options)


def test_the_number_of_experts_is_a_square():
  with pytest.raises(ValueError, match='num_experts=65: accepted are squares'):
    Peer(D, 65, rngs=nnx.Rngs(0))


@pytest.mark.parametrize('owners', [(), (3,)], ids=['shared keys', 'own keys'])
def test_gradients_by_chosen_keys_are_those_of_all_scores(owners):
  """More tokens than a chunk, and not a multiple; autodiff goes through all scores."""
  key = jax.random.split(jax.random.key(0), 4)
  first, second = jax.random.normal(key[0], (2, 2 * KEYS_CHUNK + 5, 3, 4))
  keys = jax.random.normal(key[1], (2, *owners, 16, 4))
  target = jax.random.normal(key[2], (len(first), 3, 5))

  def plainly(first, second, keys, k):
    formula = 'NEH,TNH->ETN' if owners else 'EH,TNH->ETN'
    sides = (
      jnp.einsum(formula, own, half) for half, own in zip((first, second), keys, strict=True)
    )
    return [jnp.moveaxis(part, 0, -1) for part in product_top_k(*sides, k)]

  def scalar(function, *arguments):
    score, expert = function(*arguments, 5)
    return (score * target).sum(), expert

  by_chosen, by_all = (
    jax.value_and_grad(functools.partial(scalar, function), (0, 1, 2), has_aux=True)
    for function in (retrieve, plainly)
  )
  (_, expert), got = by_chosen(first, second, keys)
  (_, same), want = by_all(first, second, keys)
  np.testing.assert_array_equal(expert, same)
  for a, b in zip(got, want, strict=True):
    assert float(jnp.abs(b).max()) > 1
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_scan_over_chunks_leaves_tokens_on_their_devices():
  """Forward and backward on eight devices: XLA:CPU gathers scores for `top_k` (accelerators do not), nothing else."""
  mesh = make_mesh(8, 1, 1, 1, devices=jax.devices())
  graph, state = nnx.split(make())
  loss = lambda state, x: (nnx.merge(graph, state)(x)[0] ** 2).sum()
  x = jax.device_put(tokens((8, 2 * CHUNK // 8, D)), NamedSharding(mesh, P(BATCH_AXES)))
  state = jax.device_put(state, NamedSharding(mesh, P()))
  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(state, x).compile()
  gathers = [one for one in collectives(compiled, 8) if one.kind != 'all-reduce']
  scores = CHUNK * 2 * 8 * 4  # of a chunk's tokens, two heads, eight keys of either half
  assert all(one.kind == 'all-gather' and one.operand <= scores / 8 for one in gathers), gathers
