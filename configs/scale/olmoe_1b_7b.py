"""OLMoE 1B-7B: top-8 of 64 narrow experts in every layer.

Sizes are those of config.json of allenai/OLMoE-1B-7B-0924. Queries and keys are normed over all heads at once, and
weights of the chosen are the softmax as it is (norm_topk_prob is false).

Paper: OLMoE, Muennighoff et al. 2024 (arXiv 2409.02060): 6.9B parameters, 1.3B of them active; 5.1T tokens, batches
  of 4M tokens, AdamW 4e-4, balance loss 0.01, z loss 0.001, no dropping.
Command: scripts/python -m experiments.plan --config configs/scale/olmoe_1b_7b.py --topology v5p:2x2x4
  (to train: -m experiments.train with the same config and the mesh that the plan names)
Machine: not yet run; planned for v5p:2x2x4, see experiments/results/plans.
Time: not yet run; the plan has its estimate.
Expect: not yet run. Parameters: 6,919,161,856 in all, 1.3 billion work on a token.
Seeds: not yet run; --config.seed.
Deviations: C4 for data that is not public; a tokenizer of at most 50,304 tokens is needed, to which the table is
  padded.
"""

from configs import common


def get_config():
  config = common.get_config()
  config.steps = 1_220_000
  config.batch_size = 1024
  config.microbatches = 4
  config.data.name = 'c4/en'
  config.data.objective = 'causal'
  config.data.sequence_length = 4096
  config.data.tokenizer = 'sentencepiece:sentencepiece.model'
  config.model.kind = 'decoder'
  config.model.vocab_size = 50_304
  config.model.d_model = 2048
  config.model.num_layers = 16
  config.model.num_heads = 16
  config.model.d_ff = 1024
  config.model.qk_norm = True
  config.model.qk_norm_scope = 'all'
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.model.moe.layers = 'all'
  config.model.moe.num_experts = 64
  config.model.moe.router = {'name': 'top_k', 'k': 8, 'weighting': 'softmax_topk'}
  config.model.moe.losses = {'balance': 0.01, 'z': 0.001}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 4e-4
  config.optim.warmup_steps = 2500
  config.eval.every = 1000
  config.checkpoint.every = 500
  config.log.every = 10
  return config
