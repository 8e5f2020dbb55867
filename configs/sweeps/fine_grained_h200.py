"""Granularity 1 to 16 at expansion rate 64 on one GPU: the order of five runs, not the grid.

Width 512, four layers: 13 million active parameters, 541 million in all without embedding, head, router and norms, on
590 million tokens.

Paper: Scaling laws for fine-grained mixture of experts, Krajewski et al. 2024; its row '64 x 13M', which has 16 billion
  training tokens or more.
Command: scripts/python -m experiments.sweep --config configs/sweeps/fine_grained_h200.py
Machine: one NVIDIA H200; not yet run.
Time: not yet run. Sized by arithmetic for 30 minutes in all: matrix products alone, at 40 % of the 990 TFLOP/s that
  the H200 has in bfloat16. Gathers, the softmax over 50,257 tokens, the optimizer's pass over 541 million parameters
  and compiling come on top.
Expect: not yet run. The published law, outside of the tokens it was fitted on (16 to 130 billion), gives 4.05, 3.98,
  3.94, 3.91, 3.89 nats at granularity 1, 2, 4, 8, 16; to be tested is the order, and that g / G^gamma + h fits with
  gamma between 0.3 and 1.2.
Seeds: 0; --config.seed.
Deviations: those of fine_grained_paper.py, and batches of 512 sequences and a learning rate of 1e-3 for so short a run,
  not tuned.
"""

from configs import common

GRANULARITIES = (1, 2, 4, 8, 16)


def get_base():
  config = common.get_config()
  config.steps = 4500
  config.batch_size = 512
  config.microbatches = 2  # of 256 sequences, whose logits take 13 GB
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 256
  config.data.tokenizer = 'tiktoken:gpt2'
  config.model.kind = 'decoder'
  config.model.d_model = 512
  config.model.num_layers = 4
  config.model.num_heads = 8
  config.model.d_ff = 2048
  config.model.activation = 'relu'
  config.model.gated = False
  config.model.qk_norm = False
  config.model.tie_embeddings = False
  config.model.moe.num_experts = 64
  config.model.moe.output_norm = True
  config.model.moe.router = {
    'name': 'expert_choice',
    'capacity_factor': 1.0,
    'group': 'position',
    'group_size': 256,
    'softmax_over': 'experts',
  }
  config.model.moe.losses = {}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 45
  config.optim.final_fraction = 0.1
  config.optim.weight_decay = 0.1
  config.optim.clip_norm = 0.5
  config.eval.every = 500
  config.eval.batches = 16
  config.checkpoint.every = 0
  return config


def get_runs():
  return [{'model.moe.granularity': granularity} for granularity in GRANULARITIES]
