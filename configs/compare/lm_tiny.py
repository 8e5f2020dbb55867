"""Routers that fit a causal language model, on bytes, at equal active and total parameters.

Two experts of width 128 out of eight work on a token, or one of width 256 out of four where a router chooses one. More
work where that is the method: all experts of dense and kamoe do, in training those of ds_moe, and of dense_to_sparse
at first. Every router is here or in LEFT_OUT.

Paper: of each router, see moejax/routers.
Command: scripts/python -m experiments.compare --config configs/compare/lm_tiny.py
Results: experiments/results/compare_lm_tiny.
"""

from configs.sweeps import fine_grained_cpu, grid

SEEDS = (0, 1, 2)
BALANCE = {'balance': 0.01, 'z': 0.001}
ONE = {'model.moe.num_experts': 4, 'model.moe.d_ff': 256}  # for routers of one choice
ARMS = (
  ({'name': 'top_k', 'k': 2}, BALANCE, {}),
  ({'name': 'top_k', 'k': 2, 'weighting': 'sigmoid_norm'}, BALANCE, {}),
  ({'name': 'top_k', 'k': 2, 'weighting': 'softmax_topk'}, BALANCE, {}),
  ({'name': 'noisy_top_k', 'k': 2}, {'importance': 0.1, 'load': 0.1}, {}),
  ({'name': 'cosine', 'k': 2}, BALANCE, {}),
  ({'name': 'group_limited', 'k': 2, 'balance_bias': False}, BALANCE, {}),
  ({'name': 'modified_softmax', 'k': 2}, BALANCE, {}),
  ({'name': 'ada_moe'}, BALANCE, {}),
  ({'name': 'expert_choice', 'capacity_factor': 2.0, 'group': 'position'}, {}, {}),
  ({'name': 'sinkhorn_expert_choice', 'capacity_factor': 2.0, 'group': 'position'}, {}, {}),
  ({'name': 'switch'}, BALANCE, ONE),
  ({'name': 'smile'}, {'cluster_balance': 0.01, 'member_balance': 0.01, 'z': 0.001}, ONE),
  ({'name': 'locmoe'}, BALANCE, ONE),
  ({'name': 'hash'}, {}, ONE),
  ({'name': 'thor'}, {}, ONE),
  ({'name': 'top_k', 'k': 1}, BALANCE, ONE),
  ({'name': 'gshard', 'priority': 'token_major'}, BALANCE, {}),
  ({'name': 'mask_moe', 'k': 2, 'vocab_size': 256}, BALANCE, {}),
  ({'name': 'top_p', 'p': 0.4}, {'balance': 0.01, 'entropy': 1e-4}, {}),
  ({'name': 'smoe_dropout', 'k_min': 1, 'k_max': 3, 'eval_k': 2}, {}, {}),
  ({'name': 'ewa'}, {}, ONE | {'optim.average_rate': 0.3}),
  ({'name': 'dense_to_sparse'}, BALANCE, ONE),
  ({'name': 'ds_moe', 'eval_k': 2}, {'mutual_information': 6.3e-4}, {}),
  ({'name': 'moec'}, {'balance': 0.01, 'cluster_variance': 0.01}, ONE),
  ({'name': 'rmoe', 'k': 2, 'width': 64}, BALANCE, {}),
  ({'name': 'gating_residual', 'k': 2}, BALANCE, {}),
  ({'name': 'pre_gated', 'k': 2}, BALANCE, {}),
  ({'name': 'read_me', 'k': 2}, BALANCE, {}),
  ({'name': 'spatial', 'k': 2, 'positions': 64}, BALANCE, {}),
  (
    {'name': 'spatial', 'k': 2, 'positions': 64, 'weighting': 'unweighted', 'quantile': 0.7},
    {'guidance': 0.01},
    {},
  ),
  ({'name': 'mixture_of_tokens', 'group_size': 8, 'slots': 2}, {}, {}),
  ({'name': 'sparse_expert_choice', 'capacity_factor': 2.0, 'group': 'position'}, {}, {}),
  ({'name': 'dense'}, {}, {}),
  ({'name': 'kamoe'}, {}, {}),
)
LEFT_OUT = {
  'base': 'sees later tokens in training',
  'family': 'needs the language of a sequence',
  'image': 'sees later tokens: the mean of a sequence chooses',
  'm3vit': 'needs tasks',
  'sinkhorn': 'sees later tokens in training',
  'soft': 'sees later tokens',
  'space_moe': 'needs a text and maps of attention to it',
  'speech_moe': 'needs an embedding of the domain',
  'time_moe': 'needs the step of a diffusion',
  'vmoe': 'sees later tokens: they compete for the places of an expert',
}


def get_base():
  config = fine_grained_cpu.get_base()
  config.steps = 250
  config.model.d_model = 64
  config.model.d_ff = 256
  config.model.num_layers = 2
  config.model.moe.num_experts = 8
  config.model.moe.d_ff = 128
  config.model.moe.output_norm = False
  return config


def get_runs():
  arms = [
    {'model.moe.router': router, 'model.moe.losses': losses} | sizes
    for router, losses, sizes in ARMS
  ]
  return [arm | seed for arm in arms for seed in grid({'seed': SEEDS})]
