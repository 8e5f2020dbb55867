"""Three causal language models: one whose router sees later tokens, and two whose routers do not.

Paper: Mixture-of-experts with expert choice routing, Zhou et al. 2022, section 6 (limitations: expert choice looks at
  the future, so it does not fit autoregressive text generation).
Command: scripts/python -m experiments.sweep --config configs/sweeps/leak_cpu.py
Results: experiments/results/leak_cpu.
"""

from configs.sweeps import fine_grained_cpu, grid

ROUTERS = (
  {'name': 'expert_choice', 'group': 'sequence', 'capacity_factor': 1.0},
  {'name': 'expert_choice', 'group': 'position', 'capacity_factor': 1.0},
  {'name': 'top_k', 'k': 1, 'weighting': 'softmax_topk'},
)


def get_base():
  config = fine_grained_cpu.get_base()
  config.steps = 400
  config.allow_leak = True
  config.model.d_model = 64
  config.model.d_ff = 256
  config.model.num_layers = 2
  config.model.moe.losses = {'z': 0.001}
  return config


def get_runs():
  return grid({'model.moe.router': ROUTERS, 'seed': (0, 1, 2)})
