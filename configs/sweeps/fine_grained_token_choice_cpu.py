"""The ablation of fine_grained_cpu.py: token choice, top-G of 8 G experts, with a balance loss.

Paper: Krajewski et al. 2024 use expert choice throughout; token choice at granularity G is DeepSeekMoE's (Dai et al.
  2024).
Command: scripts/python -m experiments.sweep --config configs/sweeps/fine_grained_token_choice_cpu.py
Results: experiments/results/fine_grained_cpu.
"""

from configs.sweeps import fine_grained_cpu, grid


def get_base():
  config = fine_grained_cpu.get_base()
  config.steps = 400
  config.model.d_model = 96
  config.model.d_ff = 384
  config.model.num_layers = 2
  # the weights are renormalised for k > 1 only: as they are, so that granularity is all that changes
  config.model.moe.router = {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk'}
  config.model.moe.losses = {'balance': 0.01}
  return config


def get_runs():
  return grid({'model.moe.granularity': (1, 2, 4, 8), 'seed': (0, 1, 2)})
