"""Expert choice against token choice and hashing, in a masked language model on the embedded text.

Paper: Mixture-of-experts with expert choice routing, Zhou et al. 2022: figure 2 (steps to a loss), figure 4b (capacity
  factor), table 4 (hash layer, capped variants).
Command: scripts/python -m experiments.sweep --config configs/sweeps/expert_choice_cpu.py
Results: experiments/results/expert_choice_cpu.
"""

from configs import tiny_expert_choice
from configs.sweeps import grid

SEEDS = (0, 1, 2)
BALANCED = {'balance': 0.01, 'z': 0.001}
CHOICE = {'name': 'expert_choice', 'group': 'batch', 'capacity_factor': 2.0}
ARMS = (
  ({'name': 'top_k', 'k': 1, 'capacity_factor': 1.25}, BALANCED),
  ({'name': 'top_k', 'k': 2, 'capacity_factor': 1.25}, BALANCED),
  ({'name': 'hash'}, {}),
  (CHOICE | {'capacity_factor': 0.5}, {}),
  (CHOICE | {'capacity_factor': 1.0}, {}),
  (CHOICE, {}),
  (CHOICE | {'cap': 2}, {}),
  (CHOICE | {'cap': 3}, {}),
)


def get_base():
  config = tiny_expert_choice.get_config()
  config.steps = 400
  config.batch_size = 16
  config.data.sequence_length = 128
  config.model.d_model = 96
  config.model.num_layers = 2
  config.model.d_ff = 192
  config.model.moe.d_ff = 192
  config.model.moe.num_experts = 16
  config.model.moe.losses = {}
  config.eval = {'every': 25, 'batches': 8}
  config.checkpoint.every = 0
  config.log = {'every': 25, 'tensorboard': False, 'report': False}
  return config


def get_runs():
  arms = [{'model.moe.router': router, 'model.moe.losses': losses} for router, losses in ARMS]
  return [arm | seed for arm in arms for seed in grid({'seed': SEEDS})]
