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

from configs.sweeps import fine_grained_paper

GRANULARITIES = (1, 2, 4, 8, 16)


def get_base():
  config = fine_grained_paper.get_base()
  config.steps = 4500
  config.batch_size = 512
  config.microbatches = 2  # of 256 sequences, whose logits take 13 GB
  config.model.d_model = 512
  config.model.num_layers = 4
  config.model.num_heads = 8
  config.model.d_ff = 2048
  config.optim.learning_rate = 1e-3
  config.optim.warmup_steps = 45
  config.eval = {'every': 500, 'batches': 16}
  config.checkpoint.every = 0
  config.log.every = 10
  return config


def get_runs():
  return [{'model.moe.granularity': granularity} for granularity in GRANULARITIES]
