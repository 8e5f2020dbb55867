"""The layer used as it should not be: one sentence with name, value and what is accepted."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import Context, MoE, make_router
from moejax.moe.exchange import make_exchange
from moejax.moe.kinds import KINDS
from moejax.routers.router import as_batch
from moejax.transformer import Decoder

ROOT = Path(__file__).parents[2]
X = np.ones((8, 4, 16), np.float32)
MASK = np.ones((8, 4), np.int32)


def layer(**options):
  return MoE(16, 8, 4, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize(
  ('x', 'context', 'sentence'),
  [
    (X.astype(np.int32), None, r'x of dtype int32: accepted are floating-point types'),
    (X, Context(mask=MASK), r'context.mask of dtype int32: accepted is bool'),
    (X, Context(token_ids=X[..., 0]), r'context.token_ids of dtype float32: accepted is an int'),
  ],
)
def test_tokens_and_contexts_of_another_type_are_refused(x, context, sentence):
  """Integers came back cut to integers; a mask of numbers failed in some routers alone."""
  with pytest.raises(ValueError, match=sentence):
    as_batch(jnp.asarray(x), context)


def test_tokens_of_another_width_are_refused():
  with pytest.raises(ValueError, match=r'x of shape \(8, 4, 15\): expected \[..., S, D=16\]'):
    jax.eval_shape(layer(), jnp.zeros((8, 4, 15)))


def test_a_router_without_a_name_is_refused():
  with pytest.raises(ValueError, match=r"router=\{'k': 2\}: accepted are a short name"):
    layer(router={'k': 2})


@pytest.mark.parametrize(
  ('losses', 'sentence'),
  [
    ({'balance': float('nan')}, r"losses\['balance'\]=nan: accepted are finite numbers from 0"),
    ({'z': float('inf')}, r"losses\['z'\]=inf: accepted are finite numbers from 0"),
    ({'balance': -0.01}, r"losses\['balance'\]=-0.01: accepted are finite numbers from 0"),
    ({'entropy': float('-inf')}, r"losses\['entropy'\]=-inf: accepted are finite numbers$"),
  ],
)
def test_coefficients_that_no_training_could_use_are_refused(losses, sentence):
  with pytest.raises(ValueError, match=sentence):
    layer(losses=losses)


def test_entropy_may_be_rewarded():
  assert dict(layer(losses={'entropy': -0.1}).losses) == {'entropy': -0.1}


def test_a_router_of_another_width_is_refused():
  router = make_router('top_k', d_model=8, num_experts=4, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='router of d_model=8 in a layer of d_model=16'):
    layer(router=router)


@pytest.mark.parametrize(
  ('sizes', 'sentence'),
  [
    ((10, 16, 0, 2, 8), 'num_layers=0: accepted are integers from 1'),
    ((0, 16, 2, 2, 8), 'vocab_size=0: accepted are integers from 1'),
    ((10, 16, 2, 2, -1), 'd_ff=-1: accepted are integers from 1'),
  ],
)
def test_models_of_no_size_are_refused(sizes, sentence):
  with pytest.raises(ValueError, match=sentence):
    Decoder(*sizes, rngs=nnx.Rngs(0))


# What the type checker of these tests would refuse first
UNCHECKED = """
import numpy as np
from flax import nnx
from moejax import MoE, make_router
from moejax.transformer import Decoder, ViT

def layer(**options):
  return MoE(16, 8, 4, rngs=nnx.Rngs(0), **options)

x = np.ones((1, 2, 16))
for wrong in (
  lambda: layer(router=None),
  lambda: layer(dispatch='fused'),
  lambda: layer(exchange='local'),
  lambda: layer(granularity=2.0),
  lambda: layer()(x, {'train': True}),
  lambda: layer()(x, x[..., 0]),
  lambda: layer(losses={'balance': 'much'}),
  lambda: MoE(16, 8, 4, rngs=0),
  lambda: make_router('top_k', d_model=16, num_experts='4', rngs=nnx.Rngs(0)),
  lambda: make_router('top_k', d_model=16, num_experts=4, rngs=0),
  lambda: Decoder(10, 16, 2, 2, 8, rngs=0),
  lambda: ViT((8, 8, 3), 4, 10, 16, 2, 2, 8, rngs=0),
):
  try:
    wrong()
  except ValueError as error:
    print(error)
print(layer()(x.astype(np.float32))[0].shape)
"""


def test_what_is_no_value_of_its_kind_is_one_sentence_without_a_type_checker():
  done = subprocess.run(
    [sys.executable, '-c', UNCHECKED], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout.splitlines() == [
    "router=None: accepted are a short name, {'name': ..., **options} or a Router",
    "dispatch='fused': accepted is a function of moejax/moe/dispatch.py",
    "exchange='local': accepted is what moejax.moe.exchange.make_exchange returns",
    'granularity=2.0: accepted are integers from 1',
    'context is a dict: accepted is a moejax.Context, such as Context(mask=...)',
    'context is a ndarray: accepted is a moejax.Context, such as Context(mask=...)',
    "losses['balance']='much': accepted are finite numbers from 0",
    'rngs of type int: accepted is flax.nnx.Rngs, as in nnx.Rngs(0)',
    "num_experts='4': accepted are integers from 1",
    *['rngs of type int: accepted is flax.nnx.Rngs, as in nnx.Rngs(0)'] * 3,
    '(1, 2, 16)',
  ], done.stderr


MODULES = """
from flax import nnx
from moejax.moe.attention_experts import AttentionExperts
from moejax.moe.experts import Experts
from moejax.moe.kinds import BARE, KINDS, make_layer
from moejax.moe.switch_head import SwitchHead
from moejax.transformer import FFN, Attention, Latent, LatentAttention

latent = Latent(q_rank=0, kv_rank=4, rotary_dim=2)

def kind_of(name, width, rngs):
  router = None if name in BARE else 'top_k'
  return make_layer(name, width, 8, 4, router, options={'k': 2} if name == 'peer' else {}, rngs=rngs)

makers = [
  *(lambda width, rngs, name=name: kind_of(name, width, rngs) for name in KINDS),
  lambda width, rngs: AttentionExperts(width, 8, 4, rngs=rngs),
  lambda width, rngs: SwitchHead(width, 8, 4, rngs=rngs),
  lambda width, rngs: Experts(width, 8, 4, rngs=rngs),
  lambda width, rngs: FFN(width, 8, rngs=rngs),
  lambda width, rngs: Attention(width, 2, 2, 8, causal=True, rngs=rngs),
  lambda width, rngs: LatentAttention(width, 2, 8, latent, causal=True, rngs=rngs),
]
for make in makers:
  make(16, nnx.Rngs(0))
  for width, rngs in ((16, 0), (0, nnx.Rngs(0))):
    try:
      make(width, rngs)
    except ValueError as error:
      print(error)
"""


def test_every_module_refuses_a_width_of_zero_and_keys_that_are_no_rngs():
  """Most failed deep inside: an int has no attribute params."""
  done = subprocess.run(
    [sys.executable, '-c', MODULES], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.stdout.splitlines() == [
    'rngs of type int: accepted is flax.nnx.Rngs, as in nnx.Rngs(0)',
    'd_model=0: accepted are integers from 1',
  ] * (len(KINDS) + 6), done.stderr


def test_meshes_that_an_exchange_cannot_use_are_refused():
  mesh = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(AxisType.Auto,) * 2)
  with pytest.raises(ValueError, match=r"the mesh has no axis 'fsdp', only data, expert"):
    make_exchange('all_gather', mesh, ('data', 'fsdp', 'expert'))
  explicit = jax.make_mesh((2, 4), ('data', 'expert'), axis_types=(AxisType.Explicit,) * 2)
  with pytest.raises(ValueError, match=r"mesh axis 'data' is of explicit sharding"):
    make_exchange('all_gather', explicit, ('data', 'expert'))


def test_tokens_cut_over_an_explicit_axis_are_refused():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Explicit,))
  x = jax.device_put(jnp.asarray(X), NamedSharding(mesh, P('data')))
  with pytest.raises(ValueError, match=r"x is cut over mesh axis 'data' of explicit sharding"):
    as_batch(x, None)
