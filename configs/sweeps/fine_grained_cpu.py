"""Granularity 1 to 8 at three widths and three lengths of training, on the embedded text: data for a scaling law.

The routing of Krajewski et al. 2024 (expert choice among the tokens of one position, softmax over experts, output
norm) at expansion rate 8, on bytes.

Paper: Scaling laws for fine-grained mixture of experts, Krajewski et al. 2024 (expansion rate 64, 129M to 3.7B
  parameters, 16 to 130 billion tokens).
Command: scripts/python -m experiments.sweep --config configs/sweeps/fine_grained_cpu.py
Results: experiments/results/fine_grained_cpu.
Deviations: groups of 32 sequences and not 256; 64 bytes of context; warm-up of 20 steps; learning rate as given for all
  sizes, not tuned for each.
"""

from configs import common
from configs.sweeps import grid

SIZES = ((64, 2), (96, 2), (128, 3))  # width, blocks
STEPS = (100, 200, 400)  # of 2,048 tokens
GRANULARITIES = (1, 2, 4, 8)
SEEDS = (0, 1)


def get_base():
  config = common.get_config()
  config.batch_size = 32
  config.data.name = 'wiki6'
  config.data.sequence_length = 64
  config.model.num_heads = 4
  config.model.activation = 'gelu'
  config.model.gated = False
  config.model.moe.layers = 'all'
  config.model.moe.num_experts = 8
  config.model.moe.output_norm = True
  config.model.moe.router = {
    'name': 'expert_choice',
    'capacity_factor': 1.0,
    'group': 'position',
    'softmax_over': 'experts',
  }
  config.model.moe.losses = {}
  config.optim.learning_rate = 3e-3
  config.optim.warmup_steps = 20
  config.eval = {'every': 0, 'batches': 40}
  config.checkpoint.every = 0
  config.log = {'every': 20, 'tensorboard': False, 'report': False}
  return config


def get_runs():
  runs = []
  for width, blocks in SIZES:
    size = {'model.d_model': width, 'model.d_ff': 4 * width, 'model.num_layers': blocks}
    axes = {'model.moe.granularity': GRANULARITIES, 'steps': STEPS, 'seed': SEEDS}
    runs += [size | run for run in grid(axes)]
    if width < 128:  # a third seed where it is cheap, for the error of a comparison
      axes = {'model.moe.granularity': GRANULARITIES, 'steps': STEPS[-1:], 'seed': (2,)}
      runs += [size | run for run in grid(axes)]
  return runs
