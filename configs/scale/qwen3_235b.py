"""Qwen3 235B-A22B: top-8 of 128 experts in every layer, four key heads, normed queries and keys.

Sizes are those of config.json of Qwen/Qwen3-235B-A22B, whose weights hold as many parameters as are counted here:
470,187,269,120 bytes of 2 each. The balance loss is over the global batch, as ours always is.

Paper: Qwen3 technical report, 2025 (arXiv 2505.09388): 235B parameters, 22B of them active; 36T tokens.
Command: scripts/python -m experiments.plan --config configs/scale/qwen3_235b.py --topology v5p:8x8x8
  (to train: -m experiments.train with the same config and the mesh that the plan names)
Machine: not yet run; planned for v5p:8x8x8, see experiments/results/plans.
Time: not yet run; the plan has its estimate.
Expect: not yet run. Parameters: 235,093,634,560 in all, 22.2 billion work on a token.
Seeds: not yet run; --config.seed.
Deviations: C4 for data that is not public; a tokenizer of at most 151,936 tokens is needed, to which the table is
  padded. Its batch, learning rate and schedule are not published: those here are ours. The coefficient of the
  balance loss is that of config.json.
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
  config.model.vocab_size = 151_936
  config.model.d_model = 4096
  config.model.num_layers = 94
  config.model.num_heads = 64
  config.model.num_kv_heads = 4
  config.model.head_dim = 128
  config.model.d_ff = 1536
  config.model.qk_norm = True
  config.model.rope_theta = 1_000_000.0
  config.model.tie_embeddings = False
  config.model.remat = 'full'
  config.model.moe.layers = 'all'
  config.model.moe.num_experts = 128
  config.model.moe.router = {'name': 'top_k', 'k': 8, 'weighting': 'softmax_topk_norm'}
  config.model.moe.losses = {'balance': 0.001}
  config.optim.schedule = 'cosine'
  config.optim.learning_rate = 2e-4
  config.optim.warmup_steps = 2000
  config.eval.every = 1000
  config.checkpoint.every = 500
  config.log.every = 10
  return config
