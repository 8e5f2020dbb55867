"""Soft MoE against its rivals and its own ablations, on the embedded images.

A ViT of four blocks on 16 patches an image. At equal cost: 16 slots (or places) for 16 tokens in every mixture.

Paper: Soft MoE, Puigcerver et al. 2023: figure 3 (routers), table 2 (mixing), figure 6 (slots and experts), tables 4-6
  (placement).
Command: scripts/python -m experiments.sweep --config configs/sweeps/soft_moe_cpu.py
Results: experiments/results/soft_moe_cpu.
"""

from configs import tiny_soft_moe_vit
from configs.sweeps import grid

SEEDS = (0, 1, 2)
TOKEN_CHOICE = {'name': 'top_k', 'k': 1, 'capacity_factor': 1.0}
ROUTERS = {
  'soft': {'name': 'soft', 'slots': 1},
  'experts_choice': {'name': 'expert_choice', 'capacity_factor': 1.0, 'group': 'sequence'},
  'tokens_choice': TOKEN_CHOICE,
  'tokens_choice_bpr': TOKEN_CHOICE | {'priority': 'score'},
}
MIXINGS = ('learned_dispatch', 'learned_combine', 'uniform', 'identity')
# experts and slots of each; 16 experts of one slot are in ROUTERS
SLOTS = ((1, 16), (2, 8), (4, 4), (8, 2), (1, 64), (4, 16), (16, 4), (64, 1))
# layers and experts of each, 32 in all as in the last half, which is in ROUTERS
PLACEMENTS = (('0,1', 16), ('1,3', 16), ('2', 32), ('3', 32), ('0,1,2,3', 8))


def get_base():
  config = tiny_soft_moe_vit.get_config()
  config.steps = 400
  config.optim.warmup_steps = 40
  config.eval = {'every': 0, 'batches': 16}
  config.checkpoint.every = 0
  config.log = {'every': 40, 'tensorboard': False, 'report': False}
  return config


def get_runs():
  losses = {'soft': {}, 'experts_choice': {}}
  arms = [{'model.moe.layers': 'none'}]
  for name, router in ROUTERS.items():
    arms.append(
      {'model.moe.router': router, 'model.moe.losses': losses.get(name, {'balance': 0.01})}
    )
  arms += [{'model.moe.router': {'name': 'soft', 'mixing': mixing}} for mixing in MIXINGS]
  for experts, slots in SLOTS:
    arms.append(
      {'model.moe.num_experts': experts, 'model.moe.router': {'name': 'soft', 'slots': slots}}
    )
  for layers, experts in PLACEMENTS:
    changed = {} if experts == 16 else {'model.moe.num_experts': experts}
    arms.append({'model.moe.layers': layers} | changed)
  return [arm | seed for arm in arms for seed in grid({'seed': SEEDS})]
