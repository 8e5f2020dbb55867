"""Our side of scripts/bench_train.py: a decoder as OLMoE's, trained by the step of experiments/step.py."""

import dataclasses
import functools
import time

import jax
import numpy as np

from configs.common import get_config
from experiments.optim import make_optimizer
from experiments.settings import Settings
from experiments.state import ModelDef, make_state
from experiments.step import controls, make_train_step
from moejax.mesh.make import make_mesh
from moejax.moe.layer import MoE
from moejax.transformer import Decoder
from moejax.transformer.flops import forward_flops_per_token

BATCH, LENGTH, VOCABULARY = 16, 256, 256
WIDTH, LAYERS, HEADS = 256, 4, 4
EXPERTS, HIDDEN, CHOICES = 16, 256, 2
OPTIMIZER = {'learning_rate': 1e-3, 'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}
CLIP_NORM = 1.0
LOSSES = {'balance': 0.01, 'z': 0.001}


class Ours:
  """Our training step on one CPU device, compiled, its state donated."""

  def __init__(self, tokens):
    usual = Settings.from_config(get_config()).optim
    changes = dict(schedule='constant', warmup_steps=0, final_fraction=1.0, clip_norm=CLIP_NORM)
    optim = dataclasses.replace(usual, **changes, **OPTIMIZER)
    mesh = make_mesh(devices=jax.devices('cpu')[:1])
    definition = ModelDef(our_model)
    optimizer = functools.partial(make_optimizer, optim)
    init, _, optimizer = make_state(definition, optimizer, mesh)
    options = dict(microbatches=1, losses=LOSSES, bias_rate=0.0)
    step = make_train_step(definition, optimizer, **options)
    self.state = init(jax.random.key(0))
    self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
    ones = np.ones(tokens.shape, np.int32)
    self.batch = {
      'tokens': tokens,
      'targets': np.roll(tokens, -1, axis=1),
      'segment_ids': ones,
      'positions': ones.cumsum(axis=1, dtype=np.int32) - 1,
      'loss_mask': np.arange(LENGTH)[None, :] < ones * (LENGTH - 1),
    }
    self._control = controls(optim, seed=0, steps=1)(0)
    start = time.perf_counter()
    jitted = jax.jit(step, donate_argnums=0)
    self._step = jitted.lower(self.state, self.batch, self._control).compile()
    self.compile_seconds = time.perf_counter() - start

  def train(self, steps: int) -> float:
    """The loss of the last of so many steps."""
    for _ in range(steps):
      self.state, metrics = self._step(self.state, self.batch, self._control)
    return float(metrics['loss'])


def flops_per_token() -> int:
  """Model FLOPs of a training step, three times the forward pass, by token; the same of both sides."""
  mixture = {'experts': CHOICES * 3 * 2 * WIDTH * HIDDEN, 'router': 2 * WIDTH * EXPERTS}
  sizes = dict(
    vocab_size=VOCABULARY, d_model=WIDTH, num_layers=LAYERS, num_heads=HEADS, d_ff=HIDDEN
  )
  parts = forward_flops_per_token(**sizes, seq_len=LENGTH, num_moe_layers=LAYERS, moe=mixture)
  return 3 * sum(parts.values())


def our_model(rngs):
  """A decoder with a mixture in every block, as OLMoE (Muennighoff et al. 2024)."""
  router = {'name': 'top_k', 'k': CHOICES, 'weighting': 'softmax_topk'}
  moe = lambda rngs: MoE(WIDTH, HIDDEN, EXPERTS, router, losses={}, rngs=rngs)
  layers = tuple(range(LAYERS))
  options = dict(qk_norm=True, tie_embeddings=False, moe=moe, moe_layers=layers, unroll=LAYERS)
  sizes = (VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN)
  return Decoder(*sizes, **options, attention='pieces', rngs=rngs)
