"""Ling-Plus, the 300B mixture: 4 of 64 experts and a shared one in every layer.

Sizes are those of config.json of inclusionAI/Ling-plus-base (its pull request 1: 42 heads, 6 key heads; a second one
pads them to 56 and 8 with head_dim 128).

Paper: Every FLOP counts, Ling team 2025 (arXiv 2503.05139): 290B parameters, 28.8B of them active; 9T tokens.
Command: scripts/python -m experiments.plan --config configs/scale/ling_300b.py --topology v5p:8x8x8
  (to train: -m experiments.train with the same config and the mesh that the plan names)
Machine: not yet run; planned for v5p:8x8x8, see experiments/results/plans.
Time: not yet run; the plan has its estimate.
Expect: not yet run. Parameters: 290,602,910,976 in all, 29.0 billion work on a token: what config.json makes, for no
  count of the weights was found.
Seeds: not yet run; --config.seed.
Deviations: C4 for data that is not public; a tokenizer of at most 126,464 tokens is needed, to which the table is
  padded. No NormHead (the head's rows normed; it has no parameters) and no warm-up by random routing. Batch and
  schedule are ours.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 500_000
  config.batch_size = 4096
  config.microbatches = 8
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 4096
  config.data.tokenizer = 'sentencepiece:sentencepiece.model'
  config.model.kind = 'decoder'
  config.model.vocab_size = 126_464
  config.model.d_model = 5376
  config.model.num_layers = 88
  config.model.num_heads = 42
  config.model.num_kv_heads = 6
  config.model.d_ff = 12_288
  config.model.qk_norm = False
  config.model.rope_theta = 600_000.0
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.model.moe.layers = 'all'
  config.model.moe.num_experts = 64
  config.model.moe.d_ff = 3072
  config.model.moe.num_shared = 1
  config.model.moe.router = {
    'name': 'top_k',
    'k': 4,
    'weighting': 'softmax_topk_norm',
    'init_std': 0.006,
  }
  config.model.moe.losses = {'balance': 0.01, 'z': 0.001}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 2e-4
  config.optim.warmup_steps = 2000
  config.eval.every = 1000
  config.checkpoint.every = 500
  config.log.every = 10
  return config
