"""Routers that fit an image classifier, on handwritten digits, at equal active and total parameters.

A ViT of four blocks on 16 patches, the last two blocks mixtures of 16 experts, of which one works on a token (or 16
slots on the 16 patches of an image), and of top_p as many as it takes; beside them the same ViT without mixtures.
Every router is here or in LEFT_OUT.

Paper: of each router, see moejax/routers.
Command: scripts/python -m experiments.compare --config configs/compare/vision_tiny.py
Results: experiments/results/compare_vision_tiny.

Since most of those runs (the rows without `losses` in result.json) images that fill the last batch of an evaluation
are routed no more; those were not trained again.
"""

from configs import tiny_soft_moe_vit
from configs.sweeps import grid

SEEDS = (0, 1, 2)
BALANCE = {'balance': 0.01}
ARMS = (
  ({'name': 'top_k', 'k': 1}, BALANCE),
  ({'name': 'switch'}, BALANCE),
  ({'name': 'vmoe', 'k': 1, 'capacity_factor': 1.0}, {'importance': 0.01, 'load': 0.01}),
  ({'name': 'cosine', 'k': 1}, BALANCE),
  ({'name': 'sinkhorn', 'k': 1}, {}),
  ({'name': 'base'}, {}),
  ({'name': 'thor'}, {}),
  ({'name': 'expert_choice', 'capacity_factor': 1.0}, {}),
  ({'name': 'expert_choice', 'capacity_factor': 1.0, 'group': 'batch'}, {}),
  ({'name': 'sinkhorn_expert_choice', 'capacity_factor': 1.0}, {}),
  ({'name': 'mixture_of_tokens', 'group_size': 16}, {}),
  ({'name': 'smile', 'nodes': 4}, {'cluster_balance': 0.01, 'member_balance': 0.01}),
  ({'name': 'moec', 'clusters': 4}, {'balance': 0.01, 'cluster_variance': 0.01}),
  ({'name': 'locmoe'}, BALANCE),
  ({'name': 'image'}, BALANCE),
  ({'name': 'spatial', 'k': 1, 'positions': 16}, BALANCE),
  (
    {'name': 'spatial', 'k': 1, 'positions': 16, 'weighting': 'unweighted', 'quantile': 0.7},
    {'guidance': 0.01},
  ),
  ({'name': 'soft'}, {}),
  ({'name': 'soft', 'mixing': 'uniform'}, {}),
  ({'name': 'soft', 'mixing': 'identity'}, {}),
  ({'name': 'sparse_expert_choice', 'capacity_factor': 1.0}, {}),
  ({'name': 'ada_moe', 'k': 2}, BALANCE),
  ({'name': 'top_p', 'p': 0.4}, {'balance': 0.01, 'entropy': 1e-4}),
  ({'name': 'noisy_top_k', 'k': 1, 'weighting': 'softmax_topk'}, {'importance': 0.1, 'load': 0.1}),
  ({'name': 'modified_softmax', 'k': 1, 'weighting': 'softmax_topk'}, BALANCE),
)
LEFT_OUT = {
  'dense': 'all 16 experts work on a token',
  'dense_to_sparse': 'all 16 experts work on a token at first',
  'ds_moe': 'all 16 experts work on a token in training',
  'ewa': 'draws experts as thor does; its averaging is compared in lm_tiny',
  'family': 'needs the language of a sequence',
  'gating_residual': 'chooses by the mixture below, and there are two mixtures; compared in lm_tiny',
  'group_limited': 'with one choice it is top_k: the best expert is in the best group',
  'gshard': 'two experts work on a token',
  'hash': 'needs token ids',
  'kamoe': 'all 16 experts work on a token',
  'm3vit': 'needs tasks',
  'mask_moe': 'needs token ids',
  'pre_gated': 'chooses by the mixture below, and there are two mixtures; compared in lm_tiny',
  'read_me': 'a router for all layers, and there are two mixtures; compared in lm_tiny',
  'rmoe': 'chooses by the mixture below, and there are two mixtures; compared in lm_tiny',
  'smoe_dropout': 'experts on a token grow with the steps, to more than one',
  'space_moe': 'needs a text and maps of attention to it',
  'speech_moe': 'needs an embedding of the domain',
  'time_moe': 'needs the step of a diffusion',
}


def get_base():
  config = tiny_soft_moe_vit.get_config()
  config.steps = 400
  config.model.d_model = 64
  config.model.d_ff = 128
  config.model.moe.d_ff = 128
  config.optim.learning_rate = 2e-3
  config.optim.warmup_steps = 40
  config.eval = {'every': 0, 'batches': 16}
  config.checkpoint.every = 0
  config.log = {'every': 40, 'tensorboard': False, 'report': False}
  return config


def get_runs():
  arms = [{'model.moe.router': router, 'model.moe.losses': losses} for router, losses in ARMS]
  return [
    arm | seed for arm in [{'model.moe.layers': 'none'}, *arms] for seed in grid({'seed': SEEDS})
  ]
